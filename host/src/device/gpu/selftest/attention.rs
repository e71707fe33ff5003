//! Attention over the paged cache: row by row, split and whole, and in tiles on tensor cores.

use super::Driver;
use super::bench::{Bench, nmse};
use super::rows::{Element, Paging};
use crate::error::Result;
use half::f16;
use kernels::attention::{self, AttendArgs, Variant};
use kernels::flash::{self, FlashArgs};

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    let long: &[(usize, usize)] = &[(0, 3), (70, 1), (31, 2)];
    for (heads, kv_heads, head_dim) in [(2, 1, 8), (7, 1, 64), (4, 4, 40), (6, 2, 128), (1, 1, 256)]
    {
        for (spans, splits) in [(&long[..1], 1), (long, 1), (long, 4)] {
            check::<f16, D>(b, heads, kv_heads, head_dim, spans, splits, &PLAIN)?;
            check::<f32, D>(b, heads, kv_heads, head_dim, spans, splits, &PLAIN)?;
        }
    }
    // Of one split, of less than one, of some more.
    let others = &[(127, 1), (0, 1), (300, 1), (128, 1)];
    for look in [&PLAIN, &LOOKS[0], &LOOKS[3]] {
        check::<f16, D>(b, 4, 2, 64, others, OWN, look)?;
        check::<f16, D>(b, 9, 1, 128, others, OWN, look)?;
        check::<f16, D>(b, 5, 1, 40, others, OWN, look)?;
        check::<f32, D>(b, 3, 1, 40, others, OWN, look)?;
    }
    for look in LOOKS {
        for splits in [1, 4] {
            check::<f16, D>(b, 4, 2, 64, long, splits, look)?;
            check::<f32, D>(b, 7, 1, 40, long, splits, look)?;
        }
        let spans = &[(63, 1), (70, 30), (0, 70), (31, 2)];
        check_flash(b, 9, 3, 64, spans, look)?;
        check_flash(b, 2, 1, 96, spans, look)?;
    }
    for (heads, kv_heads, head_dim) in [
        (2, 1, 16),
        (7, 1, 64),
        (9, 3, 64),
        (3, 3, 40),
        (8, 2, 128),
        (2, 1, 96),
    ] {
        check_flash(b, heads, kv_heads, head_dim, &[(0, 3)], &PLAIN)?;
        check_flash(b, heads, kv_heads, head_dim, &[(0, 70)], &PLAIN)?;
        check_flash(
            b,
            heads,
            kv_heads,
            head_dim,
            &[(63, 1), (70, 30), (0, 33), (31, 2)],
            &PLAIN,
        )?;
    }
    Ok(())
}

/// How attention looks at tokens.
#[derive(Debug)]
pub struct Look {
    pub window: usize,
    pub soft_cap: f32,
    pub sinks: bool,
}

pub const PLAIN: Look = Look {
    window: 0,
    soft_cap: 0.0,
    sinks: false,
};

const LOOKS: &[Look] = &[
    Look {
        window: 20,
        ..PLAIN
    },
    Look {
        soft_cap: 3.0,
        ..PLAIN
    },
    Look {
        sinks: true,
        ..PLAIN
    },
    Look {
        window: 33,
        soft_cap: 5.0,
        sinks: true,
    },
];

impl Look {
    /// As kernels take it, with the sinks of `heads` heads, and these.
    pub fn variant<D: Driver>(
        &self,
        b: &mut Bench<'_, D>,
        heads: usize,
    ) -> Result<(Variant, Option<Vec<f32>>)> {
        let sinks = self.sinks.then(|| b.random.values(heads));
        let sinks_on = match &sinks {
            Some(sinks) => b.upload(sinks)?.ptr::<f32>().cast_const(),
            None => std::ptr::null(),
        };
        let variant = Variant {
            window: self.window as u32,
            soft_cap: self.soft_cap,
            sinks: sinks_on,
        };
        Ok((variant, sinks))
    }

    fn name(&self) -> String {
        let Look {
            window,
            soft_cap,
            sinks,
        } = self;
        match (window, soft_cap, sinks) {
            (0, 0.0, false) => String::new(),
            _ => format!(", window {window}, cap {soft_cap}, sinks {sinks}"),
        }
    }
}

/// Tokens of a cache, as a sequence of `[keys, values][kv head][element]` for each sequence.
pub type Cached = Vec<Vec<[Vec<Vec<f32>>; 2]>>;

/// Fills the cache; keys far from zero, as those of a model with large key biases are.
fn fill<E: Element, D: Driver>(
    b: &mut Bench<'_, D>,
    paging: &Paging,
    kv_heads: usize,
    head_dim: usize,
    spans: &[(usize, usize)],
) -> Result<Cached> {
    let mut cached = Vec::new();
    for (sequence, (past, len)) in spans.iter().enumerate() {
        let mut tokens = Vec::new();
        for token in 0..past + len {
            let mut kinds = [Vec::new(), Vec::new()];
            for (kind, offset) in kinds.iter_mut().zip([3.0, 0.0]) {
                let value = offset == 0.0;
                for head in 0..kv_heads {
                    let v: Vec<f32> = b
                        .random
                        .values(head_dim)
                        .iter()
                        .map(|v| E::from_f32(v + offset).to_f32())
                        .collect();
                    paging
                        .write::<E, D>(b, kv_heads, head_dim, value, head, sequence, token, &v)?;
                    kind.push(v);
                }
            }
            tokens.push(kinds);
        }
        cached.push(tokens);
    }
    Ok(cached)
}

/// Softmax attention in f64.
pub fn attention(
    q: &[f32],
    cached: &Cached,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    spans: &[(usize, usize)],
    scale: f32,
    look: &Look,
    sinks: Option<&[f32]>,
) -> Vec<f64> {
    let mut expected = Vec::with_capacity(q.len());
    let mut queries = q.chunks(head_dim);
    for (sequence, (past, len)) in spans.iter().enumerate() {
        for (r, head) in (0..*len).flat_map(|r| (0..heads).map(move |h| (r, h))) {
            let q = queries.next().unwrap_or_default();
            let kv = head / (heads / kv_heads);
            let end = past + r + 1;
            let first = match look.window {
                0 => 0,
                window => end.saturating_sub(window),
            };
            let tokens = &cached[sequence][first..end];
            let scores: Vec<f64> = tokens
                .iter()
                .map(|t| {
                    let pairs = q.iter().zip(&t[0][kv]);
                    let dot: f64 = pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    let score = dot * f64::from(scale);
                    match f64::from(look.soft_cap) {
                        0.0 => score,
                        cap => cap * (score / cap).tanh(),
                    }
                })
                .collect();
            let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let mut mass: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
            if let Some(sinks) = sinks {
                mass += (f64::from(sinks[head]) - peak).exp();
            }
            for e in 0..head_dim {
                let sum: f64 = scores
                    .iter()
                    .zip(tokens)
                    .map(|(s, t)| (s - peak).exp() * f64::from(t[1][kv][e]))
                    .sum();
                expected.push(sum / mass);
            }
        }
    }
    expected
}

fn check_flash<D: Driver>(
    b: &mut Bench<'_, D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    spans: &[(usize, usize)],
    look: &Look,
) -> Result<()> {
    let rows: usize = spans.iter().map(|s| s.1).sum();
    let (variant, sinks) = look.variant(b, heads)?;
    let paging = Paging::new(b, spans, kv_heads * head_dim * 2, &vec![0; rows])?;
    let cached = fill::<f16, D>(b, &paging, kv_heads, head_dim, spans)?;
    let q: Vec<f16> = b
        .random
        .values(rows * heads * head_dim)
        .iter()
        .map(|v| f16::from_f32(v * 3.0))
        .collect();
    let q_on = b.upload(&q)?;
    let out = b.alloc(2 * q.len())?;
    let per_tile = flash::TILE_ROWS / (heads / kv_heads);
    let mut tiles = Vec::new();
    let mut first = 0;
    for (_, len) in spans {
        for start in (0..*len).step_by(per_tile) {
            tiles.push([(first + start) as u32, per_tile.min(len - start) as u32]);
        }
        first += len;
    }
    let tiles_on = b.upload(&tiles)?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let args = FlashArgs {
        q: q_on.ptr(),
        cache: paging.layer(kv_heads, head_dim),
        step: paging.step,
        tiles: tiles_on.ptr(),
        group: (heads / kv_heads) as u32,
        scale,
        variant,
        out: out.ptr(),
    };
    let plain = look.name().is_empty();
    let (kernel, dims) = match (head_dim <= 64, plain) {
        (true, true) => ("flash_64", 64),
        (true, false) => ("flash_64_variant", 64),
        (false, true) => ("flash_128", 128),
        (false, false) => ("flash_128_variant", 128),
    };
    let grid = (kv_heads as u32, tiles.len() as u32);
    let shared = flash::shared_bytes(dims);
    b.driver
        .launch(kernel, grid, flash::THREADS, shared, &args)?;
    let halves = b.take::<f16>(kernel, out)?;
    let found: Vec<f32> = halves.into_iter().map(f16::to_f32).collect();
    let q: Vec<f32> = q.into_iter().map(f16::to_f32).collect();
    let expected = attention(
        &q,
        &cached,
        heads,
        kv_heads,
        head_dim,
        spans,
        scale,
        look,
        sinks.as_deref(),
    );
    let case = format!(
        "{heads}/{kv_heads} heads of {head_dim}, {} spans, {rows} rows{}",
        spans.len(),
        look.name()
    );
    // The weights of the tokens are rounded to f16, and so is the result.
    b.report(kernel, case, nmse(&found, &expected), 1e-6);
    Ok(())
}

/// What kernels that take a key-value head for all its query heads begin with.
const HEADS: &str = "attend_heads";

/// Rows split by their own numbers of tokens.
const OWN: u32 = 0;

fn check<E: Element, D: Driver>(
    b: &mut Bench<'_, D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    spans: &[(usize, usize)],
    splits: u32,
    look: &Look,
) -> Result<()> {
    let rows: usize = spans.iter().map(|s| s.1).sum();
    let (variant, sinks) = look.variant(b, heads)?;
    let paging = Paging::new(
        b,
        spans,
        kv_heads * head_dim * size_of::<E>(),
        &vec![0; rows],
    )?;
    let cached = fill::<E, D>(b, &paging, kv_heads, head_dim, spans)?;
    let q: Vec<f32> = b
        .random
        .values(rows * heads * head_dim)
        .iter()
        .map(|v| v * 3.0)
        .collect();
    let q_on = b.upload(&q)?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let kernel = if size_of::<E>() == 4 {
        "attend_f32"
    } else {
        "attend_f16"
    };
    let grid = (rows * heads).div_ceil(attention::THREADS as usize / 32) as u32;
    let (kv, group) = (kv_heads as u32, (heads / kv_heads) as u32);
    let run = |b: &mut Bench<'_, D>, kernel: &'static str, own: bool, splits: u32| {
        let out = b.alloc(4 * q.len())?;
        let partial = b.alloc(4 * rows * heads * splits as usize * (head_dim + 2))?;
        let args = AttendArgs {
            q: q_on.ptr(),
            cache: paging.layer(kv_heads, head_dim),
            step: paging.step,
            heads: heads as u32,
            splits,
            own: u32::from(own),
            scale,
            variant,
            out: out.ptr(),
            partial: partial.ptr(),
        };
        if kernel.starts_with(HEADS) {
            let grid = (
                rows as u32 * kernels::heads::blocks_of_row(kv, group),
                splits,
            );
            let shared = kernels::heads::shared_bytes(head_dim as u32);
            b.driver
                .launch(kernel, grid, kernels::heads::THREADS, shared, &args)?;
        } else {
            b.driver
                .launch(kernel, (grid, splits), attention::THREADS, 0, &args)?;
        }
        if splits > 1 {
            b.driver
                .launch("attend_combine", (grid, 1), attention::THREADS, 0, &args)?;
        }
        b.take::<f32>(kernel, partial)?;
        b.take::<f32>(kernel, out)
    };
    let expected = attention(
        &q,
        &cached,
        heads,
        kv_heads,
        head_dim,
        spans,
        scale,
        look,
        sinks.as_deref(),
    );
    let mut kernels = vec![kernel];
    if splits == OWN && size_of::<E>() == 2 && look.soft_cap == 0.0 {
        kernels.push(match head_dim <= 64 {
            true => "attend_heads_64",
            false => "attend_heads_128",
        });
    }
    let most = spans.iter().map(|(past, len)| past + len).max();
    for kernel in kernels {
        let (found, splits) = match splits {
            OWN => {
                let splits = attention::most_own_splits(most.unwrap_or(1)) as u32;
                let found = run(b, kernel, true, splits)?;
                // Beside rows that have more.
                let again = run(b, kernel, true, splits + 3)?;
                let pairs = found.iter().zip(&again);
                let differing = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                let case = format!(
                    "{heads}/{kv_heads} heads of {head_dim}, other grids{}",
                    look.name()
                );
                b.report(kernel, case, differing as f64, 0.0);
                (found, splits)
            }
            splits => (run(b, kernel, false, splits)?, splits),
        };
        let case = format!(
            "{heads}/{kv_heads} heads of {head_dim}, {} spans, {splits} splits{}",
            spans.len(),
            look.name()
        );
        let error = nmse(&found, &expected);
        b.report(kernel, case.clone(), error, 1e-10);
        if splits > 1 {
            b.report("attend_combine", case, error, 1e-10);
        }
    }
    Ok(())
}
