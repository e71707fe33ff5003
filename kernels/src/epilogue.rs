//! How tiles of products go to memory, alike for every form of `dense` product.
//!
//! A lane has sums in the fragments of `mma`: of eight matrix rows a tile, those of two neighbours, for two input
//! rows, the second eight below the first.

use cuda_std::float;
use cuda_std::half::to_f16;
use cuda_std::memory::{ld_v2_u32, ldg_f32, st_global_v2};

/// Where products go.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Output {
    /// f32 `[n]`.
    pub bias: *const f32,
    /// f32 `[rows][stride]`; of gate and up f16.
    pub out: *mut u8,
    /// Input rows.
    pub rows: u32,
    /// Matrix rows.
    pub n: u32,
    pub stride: u32,
    /// Whether to add to what `out` holds; not of gate and up.
    pub add: u32,
}

/// `out = sums + bias`, or `out += …`. `first` has the input row and the matrix row of the first sum.
///
/// # Safety
/// `to` is as [`Output`] says.
#[inline(always)]
pub unsafe fn store<const N: usize>(
    to: &Output,
    first: (usize, usize),
    sums: &[[f32; 4]; N],
    tiles: usize,
) {
    let stride = to.stride as usize;
    // Pairs of neighbours are aligned where rows are.
    let pairs = stride % 2 == 0 && (to.out as usize) % 8 == 0;
    let whole = pairs && first.1 + tiles * 8 <= to.n as usize;
    for half in 0..2 {
        let r = first.0 + half * 8;
        if r >= to.rows as usize {
            continue;
        }
        unsafe {
            let out = to.out.cast::<f32>().add(r * stride + first.1);
            let bias = to.bias.add(first.1);
            let sum = |j: usize| [sums[j][half * 2], sums[j][half * 2 + 1]];
            if !whole {
                store_some(to, (out, bias), first.1, sum, tiles);
                continue;
            }
            for j in 0..tiles {
                let (out, bias, v) = (out.add(j * 8), bias.add(j * 8), sum(j));
                let mut v = [v[0] + ldg_f32(bias), v[1] + ldg_f32(bias.add(1))];
                if to.add != 0 {
                    let old = ld_v2_u32(out.cast_const()).map(f32::from_bits);
                    v = [v[0] + old[0], v[1] + old[1]];
                }
                st_global_v2(out, v.map(f32::to_bits));
            }
        }
    }
}

/// A row of [`store`] whose columns are not all inside, or not aligned.
#[inline(always)]
unsafe fn store_some(
    to: &Output,
    (out, bias): (*mut f32, *const f32),
    first: usize,
    sum: impl Fn(usize) -> [f32; 2],
    tiles: usize,
) {
    for j in 0..tiles {
        for e in 0..2 {
            let c = j * 8 + e;
            if first + c < to.n as usize {
                unsafe {
                    let v = sum(j)[e] + ldg_f32(bias.add(c));
                    let out = out.add(c);
                    out.write(if to.add != 0 { out.read() + v } else { v });
                }
            }
        }
    }
}

/// `x / (1 + exp(-x))` in two instructions of the hardware: far finer than the f16 it is rounded to.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * float::rcp_approx(1.0 + float::exp2_approx(-x * core::f32::consts::LOG2_E))
}

/// `silu(gate) * up` in f16, of matrix rows that alternate, eight of one and eight of the other; `n`, of both, is
/// a multiple of 16. `first` as in [`store`].
///
/// # Safety
/// `to` is as [`Output`] says.
#[inline(always)]
pub unsafe fn store_gate_up<const N: usize>(
    to: &Output,
    first: (usize, usize),
    sums: &[[f32; 4]; N],
    tiles: usize,
) {
    for j in 0..tiles / 2 {
        let c = first.1 + j * 16;
        if c >= to.n as usize {
            continue;
        }
        unsafe {
            let at = to.bias.add(c);
            let gate = [ldg_f32(at), ldg_f32(at.add(1))];
            let up = [ldg_f32(at.add(8)), ldg_f32(at.add(9))];
            // Eight matrix rows of each give eight outputs.
            let column = c / 16 * 8 + c % 8;
            for half in 0..2 {
                let r = first.0 + half * 8;
                if r < to.rows as usize {
                    let (g, u) = (&sums[2 * j], &sums[2 * j + 1]);
                    let low = silu(g[half * 2] + gate[0]) * (u[half * 2] + up[0]);
                    let high = silu(g[half * 2 + 1] + gate[1]) * (u[half * 2 + 1] + up[1]);
                    let v = u32::from(to_f16(low)) | (u32::from(to_f16(high)) << 16);
                    let out = to.out.cast::<u16>().add(r * to.stride as usize + column);
                    out.cast::<u32>().write(v);
                }
            }
        }
    }
}
