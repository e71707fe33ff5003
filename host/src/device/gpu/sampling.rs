//! Sampling on the device: the likeliest id, or one drawn after penalty, temperature and filters.

use super::ops::{ELEMENTWISE, blocks};
use super::{Address, Buffer, Driver, Gpu, Scratch};
use crate::device::SampleRow;
use crate::error::{Error, Result};
use crate::sampling::{MIN_TEMPERATURE, fraction};
use kernels::sample::{self, ArgmaxArgs, DrawArgs};

impl<D: Driver> Gpu<D> {
    pub(super) fn op_sample(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>> {
        if rows.len() * vocabulary > logits.len {
            return Err(Error::Request(format!(
                "{} rows to sample from, too many",
                rows.len()
            )));
        }
        let plain = |row: &SampleRow<'_>| {
            row.params.temperature < MIN_TEMPERATURE
                && (row.params.repetition_penalty == 1.0 || row.seen.is_empty())
        };
        if let [row] = rows
            && plain(row)
            && let Some(sequence) = self.chooser()
        {
            self.step_ahead(row.ahead)?;
            let id = self.chosen(sequence)?;
            return self.within(vocabulary, vec![id]);
        }
        let out = self.scratch(Scratch::Ids, rows.len().max(1) * 4)?;
        if rows.iter().any(plain) {
            self.argmax(logits, vocabulary, rows.len(), out)?;
        }
        for (i, row) in rows.iter().enumerate() {
            if !plain(row) {
                let logits = logits.address + (4 * i * vocabulary) as u64;
                self.draw(logits, vocabulary, row, out + 4 * i as u64)?;
            }
        }
        let mut ids = vec![0u32; rows.len()];
        self.driver.read(out, bytemuck::cast_slice_mut(&mut ids))?;
        self.within(vocabulary, ids)
    }

    /// `ids`, all of them within the vocabulary.
    fn within(&self, vocabulary: usize, ids: Vec<u32>) -> Result<Vec<u32>> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Device {
                device: self.driver.info().name.clone(),
                what: format!("sampling chose id {id} of a vocabulary of {vocabulary}"),
            });
        }
        Ok(ids)
    }

    fn argmax(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: usize,
        out: Address,
    ) -> Result<()> {
        let partial = self.scratch(Scratch::Ranks, rows * sample::ARGMAX_BLOCKS as usize * 8)?;
        let args = ArgmaxArgs {
            logits: logits.ptr(),
            vocabulary: vocabulary as u32,
            partial: partial as *mut u64,
            out: out as *mut u32,
        };
        let grid = (sample::ARGMAX_BLOCKS, rows as u32);
        self.driver
            .launch("argmax", grid, sample::ARGMAX_THREADS, 256, &args)?;
        self.driver
            .launch("argmax_final", (rows as u32, 1), 32, 256, &args)
    }

    fn draw(
        &mut self,
        logits: Address,
        vocabulary: usize,
        row: &SampleRow<'_>,
        out: Address,
    ) -> Result<()> {
        // Scratch for the scaled logits, and the ids seen behind them.
        let work = self.scratch(Scratch::Logits, vocabulary * 8)?;
        let seen = work + 4 * vocabulary as u64;
        let penalised = row.params.repetition_penalty != 1.0 && !row.seen.is_empty();
        if penalised {
            self.driver.write(seen, bytemuck::cast_slice(row.seen))?;
        }
        let p = row.params;
        let args = DrawArgs {
            logits: logits as *const f32,
            work: work as *mut f32,
            vocabulary: vocabulary as u32,
            seen: seen as *const u32,
            seen_len: if penalised { row.seen.len() as u32 } else { 0 },
            penalty: p.repetition_penalty,
            temperature: if p.temperature < MIN_TEMPERATURE {
                0.0
            } else {
                p.temperature
            },
            top_k: p.top_k,
            top_p: fraction(p.top_p),
            min_p: fraction(p.min_p),
            u: fraction(row.u).min((1 << 24) - 1),
            out: out as *mut u32,
        };
        let grid = (blocks(vocabulary, ELEMENTWISE), 1);
        self.driver
            .launch("scale_logits", grid, ELEMENTWISE, 0, &args)?;
        if penalised {
            let grid = (blocks(row.seen.len(), ELEMENTWISE), 1);
            self.driver
                .launch("penalise", grid, ELEMENTWISE, 0, &args)?;
        }
        self.driver.launch(
            "draw",
            (1, 1),
            sample::DRAW_THREADS,
            sample::DRAW_SHARED,
            &args,
        )
    }
}
