//! A warp's running softmax over tiles of tokens (arXiv:2205.14135), and where it leaves what comes of it.

use super::attend::{EIGHT, PART, Values, WIDTH, part_place, place_in_fragment};
use crate::attention::NONE;
use crate::unrolled;
use cuda_std::half::{F16, pack_f16x2};
use cuda_std::int::{here, prmt};
use cuda_std::shared::SharedPtr;
use cuda_std::{float, mma, warp};

/// A tile's weights, as B's fragments: rounded to f16, and what the rounding leaves over.
type Weights = [[u32; 2]; 2];

/// Of `H` times [`WIDTH`] elements.
pub(crate) struct Running<const H: usize> {
    /// Of head `g`.
    peak: f32,
    /// The weights' sum, likewise.
    mass: f32,
    /// Whether there were any tokens.
    begun: u32,
    /// Of heads `2 t` and `2 t + 1`, elements `8 g + 2 j` and the next.
    sums: [[[f32; 4]; 4]; H],
}

/// Two values as pairs of f16: rounded, and what the rounding leaves over.
#[inline(always)]
pub(super) fn split(low: f32, high: f32) -> [u32; 2] {
    let word = pack_f16x2(low, high);
    let back = |bits: u32| F16::from_bits(bits as u16).to_f32();
    [word, pack_f16x2(low - back(word), high - back(word >> 16))]
}

/// The same number, known from here on.
#[inline(always)]
fn unknown(v: f32) -> f32 {
    f32::from_bits(here(v.to_bits()))
}

impl<const H: usize> Running<H> {
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            peak: NONE,
            mass: 0.0,
            // Where it is known to begin with zero, the first tile gets code of its own.
            begun: here(0),
            sums: [[[0.0; 4]; 4]; H],
        }
    }

    /// Of no tokens, where others have had some: as numbers that are made here, and not before it is known who has, when keys and
    /// values take all registers.
    #[inline(always)]
    pub fn none() -> Self {
        let mut none = Self::new();
        none.mass = unknown(none.mass);
        none.sums = none.sums.map(|part| part.map(|sums| sums.map(unknown)));
        none
    }

    /// Takes tiles' scores in, of each of which this lane has four of head `g`.
    #[inline(always)]
    pub fn weigh<const N: usize>(&mut self, s: [[f32; 4]; N]) -> [Weights; N] {
        let mut top = NONE;
        for s in &s {
            top = top.max(s[0].max(s[1]).max(s[2].max(s[3])));
        }
        for width in [1, 2] {
            top = top.max(warp::shuffle_xor(top, width));
        }
        // Nothing has been summed yet for the first tile, which most often is the only one.
        if self.begun != 0 {
            top = top.max(self.peak);
            let shrink = float::exp2_approx(self.peak - top);
            self.mass *= shrink;
            let (_, t) = place_in_fragment();
            for i in 0..2 {
                let shrink = warp::shuffle_idx(shrink, (2 * t + i as u32) * 4);
                for h in 0..H {
                    for j in 0..4 {
                        self.sums[h][j][i] *= shrink;
                        self.sums[h][j][i + 2] *= shrink;
                    }
                }
            }
        }
        self.peak = top;
        self.begun = 1;
        let mut mass = 0.0;
        let weights = s.map(|s| {
            let weights: [f32; 4] = unrolled!(4, |i| float::exp2_approx(s[i] - top));
            mass += (weights[0] + weights[1]) + (weights[2] + weights[3]);
            let (near, far) = (split(weights[0], weights[1]), split(weights[2], weights[3]));
            [0, 1].map(|rest| [near[rest], far[rest]])
        });
        // Here, where nobody waits for it.
        for width in [1, 2] {
            mass += warp::shuffle_xor(mass, width);
        }
        self.mass += mass;
        weights
    }

    /// Adds a tile's values by weight, of one part of the elements.
    #[inline(always)]
    pub fn add(&mut self, part: usize, v: &Values, p: &Weights) {
        for p in p {
            for j in 0..4 {
                let values = [
                    prmt(v[0][j], v[1][j], 0x5410),
                    prmt(v[0][j], v[1][j], 0x7632),
                    prmt(v[2][j], v[3][j], 0x5410),
                    prmt(v[2][j], v[3][j], 0x7632),
                ];
                self.sums[part][j] = mma::m16n8k16_f16(values, *p, self.sums[part][j]);
            }
        }
    }

    /// Leaves it in warp `warp`'s parts of so many heads, `stride` words from each to the next, first those of the first halves of wide
    /// ones. Who had no tokens leaves parts of no weight, without sums where `sums` is not set.
    #[inline(always)]
    pub unsafe fn leave(
        &self,
        parts: SharedPtr<f32>,
        stride: u32,
        heads: u32,
        warp: u32,
        sums: bool,
    ) {
        let (g, t) = place_in_fragment();
        for h in 0..H as u32 {
            let part = parts.add((h * heads + g) * stride + warp * PART);
            if g < heads && t == 0 {
                unsafe { part.add(WIDTH).store_v2([self.peak, self.mass]) }
            }
        }
        if !sums {
            return;
        }
        for i in 0..2 {
            let head = 2 * t + i as u32;
            if head < heads {
                for h in 0..H {
                    let of_head = (h as u32 * heads + head) * stride;
                    let part = parts.add(of_head + warp * PART);
                    for j in [0, 2] {
                        let (s, next) = (self.sums[h][j], self.sums[h][j + 1]);
                        let at = part.add(part_place(g * EIGHT + 2 * j as u32));
                        unsafe { at.store_v4([s[i], s[i + 2], next[i], next[i + 2]]) }
                    }
                }
            }
        }
    }
}
