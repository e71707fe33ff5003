//! Making an embedding of a text's hidden states.

use super::super::{Event, StopReason};
use super::Sequence;
use crate::error::Result;
use crate::model::{Pooling, Runner};

impl Sequence<'_> {
    pub(in super::super) fn is_embedding(&self) -> bool {
        self.submission.request.embed.is_some()
    }

    /// Takes the hidden states of the step's `len` rows.
    ///
    /// # Errors
    /// The device's failure.
    pub(in super::super) fn gather(&mut self, runner: &mut dyn Runner, len: usize) -> Result<()> {
        if self.cached == 0 {
            // Anew, where the sequence was put back.
            self.pooled.clear();
        }
        let rows = match self.submission.request.embed {
            Some(Pooling::Mean) => 0..len,
            _ => len - 1..len,
        };
        for row in rows {
            let hidden = runner.hidden(row)?;
            if self.pooled.is_empty() || self.submission.request.embed == Some(Pooling::Last) {
                self.pooled = hidden.into_iter().map(f64::from).collect();
            } else {
                let sums = self.pooled.iter_mut().zip(hidden);
                sums.for_each(|(sum, x)| *sum += f64::from(x));
            }
        }
        Ok(())
    }

    /// Sends the embedding once the whole prompt is in it.
    pub(in super::super) fn embedded(&mut self) -> Option<StopReason> {
        if !self.pending().is_empty() {
            return None;
        }
        // The mean's divisor is lost in the length of 1.
        let length = self.pooled.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        let vector = self.pooled.iter().map(|x| (x * scale) as f32).collect();
        self.send(Event::Embedding(vector));
        Some(StopReason::Eos)
    }
}
