//! Sampling on the device: the likeliest id, or one drawn after penalty, temperature and filters.

use super::ops::{ELEMENTWISE, blocks};
use super::program::bytes;
use super::{Address, Buffer, Driver, Gpu, Scratch};
use crate::device::SampleRow;
use crate::error::{Error, Result};
use crate::sampling::{MIN_TEMPERATURE, fraction};
use kernels::sample::{self, ArgmaxArgs, DrawArgs, DrawRow};

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
        let drawn: Vec<(usize, &SampleRow<'_>)> =
            rows.iter().enumerate().filter(|(_, r)| !plain(r)).collect();
        if !drawn.is_empty() {
            self.draw(logits, vocabulary, &drawn, out)?;
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

    /// Draws tokens for rows of `logits`, which come with their numbers, into those places of `out`.
    fn draw(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: &[(usize, &SampleRow<'_>)],
        out: Address,
    ) -> Result<()> {
        let penalised =
            |row: &SampleRow<'_>| row.params.repetition_penalty != 1.0 && !row.seen.is_empty();
        let seen_of = |row: &SampleRow<'_>| if penalised(row) { row.seen.len() } else { 0 };
        let seen_ids = rows.iter().map(|(_, row)| seen_of(row));
        let (all_seen, most_seen) = (seen_ids.clone().sum::<usize>(), seen_ids.max().unwrap_or(0));
        // The sums of the head's product, which has ended by then, lie where the scaled logits come.
        let work = self.scratch(Scratch::Sums, rows.len() * vocabulary * 4)?;
        let rows_bytes = size_of::<DrawRow>() * rows.len();
        let listed = self.scratch(Scratch::Draws, rows_bytes + 4 * all_seen)?;
        let mut seen = Vec::with_capacity(all_seen);
        let mut draws = Vec::with_capacity(rows.len());
        for (n, (i, row)) in rows.iter().enumerate() {
            let p = row.params;
            draws.push(DrawRow {
                logits: (logits.address + (4 * i * vocabulary) as u64) as *const f32,
                work: (work + (4 * n * vocabulary) as u64) as *mut f32,
                seen: (listed + (rows_bytes + 4 * seen.len()) as u64) as *const u32,
                out: (out + 4 * *i as u64) as *mut u32,
                vocabulary: vocabulary as u32,
                seen_len: seen_of(row) as u32,
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
            });
            seen.extend_from_slice(&row.seen[..seen_of(row)]);
        }
        let mut list = bytes(&draws).to_vec();
        list.extend_from_slice(bytes(&seen));
        self.driver.write(listed, &list)?;
        let args = DrawArgs {
            rows: listed as *const DrawRow,
        };
        let n = rows.len() as u32;
        let grid = (blocks(vocabulary, ELEMENTWISE), n);
        self.driver
            .launch("scale_logits", grid, ELEMENTWISE, 0, &args)?;
        if most_seen > 0 {
            let grid = (blocks(most_seen, ELEMENTWISE), n);
            self.driver
                .launch("penalise", grid, ELEMENTWISE, 0, &args)?;
        }
        let (threads, shared) = (sample::DRAW_THREADS, sample::DRAW_SHARED);
        self.driver.launch("draw", (1, n), threads, shared, &args)
    }
}
