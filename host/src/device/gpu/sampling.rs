//! Sampling on the device: the likeliest id, or one drawn after penalty, temperature and filters.

use super::decode::MAX_STEPS;
use super::program::bytes;
use super::{Address, Buffer, Driver, Gpu, Scratch};
use crate::device::SampleRow;
use crate::error::{Error, Result};
use crate::sampling::{MIN_TEMPERATURE, fraction};
use kernels::draw::{self, Common, DrawArgs, DrawRow};
use kernels::sample::{self, ArgmaxArgs};
use std::ptr;

/// How a token is drawn: what the choice depends on, beside the logits and the ids seen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Drawing {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    seed: u64,
    index: u64,
}

impl Drawing {
    /// `None` where the likeliest id is chosen.
    fn of(row: &SampleRow<'_>) -> Option<Self> {
        let p = row.params;
        let cold = p.temperature.is_nan() || p.temperature < MIN_TEMPERATURE;
        (!cold || p.repetition_penalty != 1.0).then_some(Self {
            temperature: if cold { 0.0 } else { p.temperature },
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            seed: row.seed,
            index: row.index,
        })
    }

    /// The same for the token that comes so many steps later.
    pub(super) fn later(self, steps: u32) -> Self {
        Self {
            index: self.index.wrapping_add(u64::from(steps)),
            ..self
        }
    }

    /// Without addresses.
    fn row(self, vocabulary: usize) -> DrawRow {
        let u = crate::sampling::uniform(self.seed, self.index);
        DrawRow {
            logits: ptr::null(),
            work: ptr::null_mut(),
            common: ptr::null_mut(),
            arrived: ptr::null_mut(),
            seen: ptr::null_mut(),
            last: ptr::null(),
            out: ptr::null_mut(),
            next: ptr::null_mut(),
            number: 0,
            vocabulary: vocabulary as u32,
            seen_len: 0,
            penalty: self.repetition_penalty,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: fraction(self.top_p),
            min_p: fraction(self.min_p),
            u: fraction(u),
        }
    }
}

/// Where the rows of launches of `draw` lie on the device, with what they need.
struct Listed {
    rows: Address,
    /// A zero for each row.
    arrived: Address,
    seen: Address,
}

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
        let ids = match rows {
            [row] if self.chooser().is_some() => {
                vec![self.sample_one(logits.address, vocabulary, row)?]
            }
            _ => self.sample_all(logits.address, vocabulary, rows)?,
        };
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Device {
                device: self.driver.info().name.clone(),
                what: format!("sampling chose id {id} of a vocabulary of {vocabulary}"),
            });
        }
        Ok(ids)
    }

    /// The choice of a step of one row. It comes to the host while the device goes on with the steps that
    /// [`SampleRow::ahead`] speaks of.
    fn sample_one(
        &mut self,
        logits: Address,
        vocabulary: usize,
        row: &SampleRow<'_>,
    ) -> Result<u32> {
        let drawing = Drawing::of(row);
        let begun = self.begun_drawing();
        if begun.is_some_and(|begun| begun != drawing) {
            return Err(Error::Request(
                "the step had begun ahead, to choose its token by other parameters".into(),
            ));
        }
        match drawing {
            None => self.step_ahead(row.ahead)?,
            Some(drawing) => {
                self.draw_ahead(logits, vocabulary, row, drawing, begun.is_some())?;
            }
        }
        self.chosen(drawing.is_some())
    }

    /// Draws the current step's token, unless that has `begun` already, and those of the steps that begin behind it.
    fn draw_ahead(
        &mut self,
        logits: Address,
        vocabulary: usize,
        row: &SampleRow<'_>,
        drawing: Drawing,
        begun: bool,
    ) -> Result<()> {
        const MOST: usize = MAX_STEPS as usize + 1;
        let seen = penalised(row);
        // The memory first: programs are forgotten where it grows.
        let listed = self.draw_list(MOST, seen.len() + MOST)?;
        let [work, common] = self.draw_scratch(vocabulary, 1)?;
        let following = self.following(row.ahead);
        let steps = following.map_or(0, |f| f.steps);
        // Of the first row, from the current step on.
        let first = u32::from(begun);
        let rows: Vec<DrawRow> = (first..=steps)
            .map(|later| {
                let number = self.last_number() + later;
                let [out, next] = self.choice_places(number);
                let of = later - first;
                DrawRow {
                    logits: logits as *const f32,
                    work: work as *mut f32,
                    common: common as *mut Common,
                    arrived: (listed.arrived + 4 * u64::from(of)) as *mut u32,
                    seen: listed.seen as *mut u32,
                    last: match later {
                        0 => ptr::null(),
                        _ => (next as *const u64).wrapping_add(1),
                    },
                    out: out as *mut u64,
                    next: next as *mut u64,
                    number,
                    seen_len: (seen.len() + later.saturating_sub(1) as usize) as u32,
                    ..drawing.later(later).row(vocabulary)
                }
            })
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        self.write_draws(&listed, MOST, &rows, seen)?;
        let row_at = |i: u32| listed.rows + (i as usize * size_of::<DrawRow>()) as u64;
        if !begun {
            self.launch_draw(row_at(0), vocabulary, 1)?;
        }
        if let Some(following) = following {
            for later in 1..=steps {
                self.run_following(&following, later)?;
                self.launch_draw(row_at(later - first), vocabulary, 1)?;
            }
            self.begun(&following, Some(drawing.later(1)));
        }
        Ok(())
    }

    fn sample_all(
        &mut self,
        logits: Address,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>> {
        let out = self.scratch(Scratch::Ids, rows.len().max(1) * 8)?;
        let drawings: Vec<Option<Drawing>> = rows.iter().map(Drawing::of).collect();
        if drawings.iter().any(Option::is_none) {
            self.argmax(logits, vocabulary, rows.len(), out)?;
        }
        // As many together as there are multiprocessors: all blocks of a launch are at work at the same time.
        let most = self.driver.multiprocessors() as usize;
        let drawn: Vec<usize> = (0..rows.len()).filter(|&i| drawings[i].is_some()).collect();
        for group in drawn.chunks(most) {
            let all_seen = group.iter().map(|&i| penalised(&rows[i]).len()).sum();
            let listed = self.draw_list(group.len(), all_seen)?;
            let [work, common] = self.draw_scratch(vocabulary, group.len())?;
            let mut seen = Vec::with_capacity(all_seen);
            let mut draws = Vec::with_capacity(group.len());
            for (n, &i) in group.iter().enumerate() {
                let Some(drawing) = drawings[i] else {
                    continue;
                };
                let own = penalised(&rows[i]);
                draws.push(DrawRow {
                    logits: (logits + (4 * i * vocabulary) as u64) as *const f32,
                    work: (work + (4 * n * vocabulary) as u64) as *mut f32,
                    common: (common + (n * size_of::<Common>()) as u64) as *mut Common,
                    arrived: (listed.arrived + 4 * n as u64) as *mut u32,
                    seen: (listed.seen + 4 * seen.len() as u64) as *mut u32,
                    out: (out + 8 * i as u64) as *mut u64,
                    seen_len: own.len() as u32,
                    ..drawing.row(vocabulary)
                });
                seen.extend_from_slice(own);
            }
            self.write_draws(&listed, group.len(), &draws, &seen)?;
            self.launch_draw(listed.rows, vocabulary, group.len())?;
        }
        let mut ids = vec![0u64; rows.len()];
        self.driver.read(out, bytemuck::cast_slice_mut(&mut ids))?;
        Ok(ids.into_iter().map(|id| id as u32).collect())
    }

    fn argmax(
        &mut self,
        logits: Address,
        vocabulary: usize,
        rows: usize,
        out: Address,
    ) -> Result<()> {
        let partial = self.scratch(Scratch::Ranks, rows * sample::ARGMAX_BLOCKS as usize * 8)?;
        let args = ArgmaxArgs {
            logits: logits as *const f32,
            vocabulary: vocabulary as u32,
            partial: partial as *mut u64,
            out: out as *mut u64,
        };
        let grid = (sample::ARGMAX_BLOCKS, rows as u32);
        self.driver
            .launch("argmax", grid, sample::ARGMAX_THREADS, 256, &args)?;
        self.driver
            .launch("argmax_final", (rows as u32, 1), 32, 256, &args)
    }

    /// Memory for so many rows to draw for, and so many ids that they have seen.
    fn draw_list(&mut self, rows: usize, seen: usize) -> Result<Listed> {
        let rows_bytes = size_of::<DrawRow>() * rows;
        let bytes = rows_bytes + 4 * (rows + seen);
        // More are seen from step to step.
        let rows_at = self.scratch(Scratch::Draws, bytes.next_power_of_two())?;
        let arrived = rows_at + rows_bytes as u64;
        Ok(Listed {
            rows: rows_at,
            arrived,
            seen: arrived + 4 * rows as u64,
        })
    }

    /// Fills a list with room for `room` rows.
    fn write_draws(
        &mut self,
        listed: &Listed,
        room: usize,
        rows: &[DrawRow],
        seen: &[u32],
    ) -> Result<()> {
        let mut list = bytes(rows).to_vec();
        list.resize(size_of::<DrawRow>() * room + 4 * room, 0);
        list.extend_from_slice(bytes(seen));
        self.driver.write(listed.rows, &list)
    }

    /// Scaled logits of so many rows, and what their blocks have in common.
    fn draw_scratch(&mut self, vocabulary: usize, rows: usize) -> Result<[Address; 2]> {
        Ok([
            // The sums of the head's product, which has ended by then, lie where the scaled logits come.
            self.scratch(Scratch::Sums, rows * vocabulary * 4)?,
            self.scratch(Scratch::Drawing, rows * size_of::<Common>())?,
        ])
    }

    /// Draws a token for each of `n` rows that are listed at `rows`, no more than multiprocessors.
    fn launch_draw(&mut self, rows: Address, vocabulary: usize, n: usize) -> Result<()> {
        let blocks = blocks(
            vocabulary,
            self.driver.multiprocessors() as usize / n.max(1),
        );
        let args = DrawArgs {
            rows: rows as *const DrawRow,
            blocks,
        };
        let grid = n as u32 * blocks;
        self.driver
            .launch_cooperative("draw", grid, draw::THREADS, draw::SHARED, &args)
    }
}

/// The ids that the repetition penalty applies to.
fn penalised<'a>(row: &SampleRow<'a>) -> &'a [u32] {
    match row.params.repetition_penalty {
        1.0 => &[],
        _ => row.seen,
    }
}

/// How many blocks share a row of logits, `most` at most.
fn blocks(vocabulary: usize, most: usize) -> u32 {
    /// Fewer ids for each would be over before its blocks have met once.
    const IDS: usize = 512;
    let most = vocabulary
        .div_ceil(IDS)
        .min(most)
        .min(draw::BLOCKS as usize);
    1 << most.max(1).ilog2()
}
