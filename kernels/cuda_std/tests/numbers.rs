//! Tensor-core products, matrix loads, asynchronous copies, vector loads, halves, elementary functions.

mod common;

use common::kernels::*;
use common::{Random, run};
use cuda_std::emulator::GuardedBuffer;
use cuda_std::params;
use half::{bf16, f16};

/// D = A·B + C in f64; A row-major (m × k), B by `b(k, n)`.
fn reference(
    m: usize,
    n: usize,
    k: usize,
    a: &[f64],
    b: impl Fn(usize, usize) -> f64,
    c: &[f64],
) -> Vec<f64> {
    (0..m * n)
        .map(|i| c[i] + (0..k).map(|j| a[i / n * k + j] * b(j, i % n)).sum::<f64>())
        .collect()
}

/// Sums of at most 32 terms of magnitude at most 4: an f32's rounding stays far below this.
fn close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(*f) - e).abs() <= 1e-5,
            "place {i}: {f}, expected {e}"
        );
    }
}

fn floats(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.float(-2.0, 2.0)).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn products_of_16_bit_elements() {
    let mut random = Random(2);
    for bf in [0u32, 1] {
        let narrow = |x: &f32| {
            if bf == 0 {
                f16::from_f32(*x).to_bits()
            } else {
                bf16::from_f32(*x).to_bits()
            }
        };
        let value = |x: &u16| {
            if bf == 0 {
                f16::from_bits(*x).to_f64()
            } else {
                bf16::from_bits(*x).to_f64()
            }
        };
        let a: Vec<u16> = floats(&mut random, 256).iter().map(narrow).collect();
        let b: Vec<u16> = floats(&mut random, 128).iter().map(narrow).collect();
        let c = floats(&mut random, 128);
        let (ga, gb, gc) = (
            GuardedBuffer::from_slice(&a),
            GuardedBuffer::from_slice(&b),
            GuardedBuffer::from_slice(&c),
        );
        let mut d = GuardedBuffer::<f32>::new(128);
        run(
            &__KERNEL_mma_16,
            1,
            32,
            0,
            &params![ga.as_ptr(), gb.as_ptr(), gc.as_ptr(), d.as_mut_ptr(), bf],
        );
        let a: Vec<f64> = a.iter().map(value).collect();
        close(
            d.as_slice(),
            &reference(16, 8, 16, &a, |k, n| value(&b[n * 16 + k]), &wide(&c)),
        );
    }
}

#[test]
fn products_of_depth_8() {
    let mut random = Random(3);
    let halves =
        |x: Vec<f32>| -> Vec<u16> { x.iter().map(|x| f16::from_f32(*x).to_bits()).collect() };
    let (a, b) = (
        halves(floats(&mut random, 128)),
        halves(floats(&mut random, 64)),
    );
    let (af, bf) = (floats(&mut random, 128), floats(&mut random, 64));
    let (ga, gb) = (GuardedBuffer::from_slice(&a), GuardedBuffer::from_slice(&b));
    let (gaf, gbf) = (
        GuardedBuffer::from_slice(&af),
        GuardedBuffer::from_slice(&bf),
    );
    let mut d = GuardedBuffer::<f32>::new(256);
    let pointers = (
        ga.as_ptr(),
        gb.as_ptr(),
        gaf.as_ptr(),
        gbf.as_ptr(),
        d.as_mut_ptr(),
    );
    run(
        &__KERNEL_mma_k8,
        1,
        32,
        0,
        &params![pointers.0, pointers.1, pointers.2, pointers.3, pointers.4],
    );
    let value = |x: &u16| f16::from_bits(*x).to_f64();
    let a: Vec<f64> = a.iter().map(value).collect();
    close(
        &d.as_slice()[..128],
        &reference(16, 8, 8, &a, |k, n| value(&b[n * 8 + k]), &[0.0; 128]),
    );
    // TF32 keeps 10 bits of mantissa, rounded to nearest.
    let tf = |x: f32| f64::from(f32::from_bits((x.to_bits() + 0x1000) & !0x1fff));
    let af: Vec<f64> = af.iter().map(|x| tf(*x)).collect();
    close(
        &d.as_slice()[128..],
        &reference(16, 8, 8, &af, |k, n| tf(bf[n * 8 + k]), &[1.0; 128]),
    );
}

#[test]
fn products_of_bytes_are_exact() {
    let mut random = Random(4);
    let a: Vec<i8> = (0..512).map(|_| random.word() as i8).collect();
    let b: Vec<i8> = (0..256).map(|_| random.word() as i8).collect();
    let (ga, gb) = (GuardedBuffer::from_slice(&a), GuardedBuffer::from_slice(&b));
    let mut d = GuardedBuffer::<i32>::new(128);
    run(
        &__KERNEL_mma_s8,
        1,
        32,
        0,
        &params![ga.as_ptr(), gb.as_ptr(), d.as_mut_ptr()],
    );
    for (i, found) in d.as_slice().iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let sum: i32 = (0..32)
            .map(|k| i32::from(a[row * 32 + k]) * i32::from(b[column * 32 + k]))
            .sum();
        let c = [1, 2, 3, 4][row / 8 * 2 + column % 2];
        assert_eq!(*found, sum + c, "row {row}, column {column}");
    }
}

#[test]
fn products_of_unsigned_bytes_are_exact() {
    let mut random = Random(14);
    let a: Vec<u8> = (0..512).map(|_| random.word() as u8).collect();
    let b: Vec<i8> = (0..256).map(|_| random.word() as i8).collect();
    let (ga, gb) = (GuardedBuffer::from_slice(&a), GuardedBuffer::from_slice(&b));
    let mut d = GuardedBuffer::<i32>::new(3 * 128);
    run(
        &__KERNEL_mma_u8_s8,
        1,
        32,
        0,
        &params![ga.as_ptr(), gb.as_ptr(), d.as_mut_ptr()],
    );
    for (part, range) in [0..32, 0..16, 16..32].into_iter().enumerate() {
        for (i, found) in d.as_slice()[128 * part..][..128].iter().enumerate() {
            let (row, column) = (i / 8, i % 8);
            let sum: i32 = range
                .clone()
                .map(|k| i32::from(a[row * 32 + k]) * i32::from(b[column * 32 + k]))
                .sum();
            let c = [1, 2, 3, 4][row / 8 * 2 + column % 2];
            assert_eq!(*found, sum + c, "{range:?}, row {row}, column {column}");
        }
    }
}

#[test]
fn a_product_through_shared_memory_and_ldmatrix() {
    let mut random = Random(5);
    let bits =
        |x: Vec<f32>| -> Vec<u16> { x.iter().map(|x| f16::from_f32(*x).to_bits()).collect() };
    let (a, b) = (
        bits(floats(&mut random, 256)),
        bits(floats(&mut random, 128)),
    );
    let (ga, gb) = (GuardedBuffer::from_slice(&a), GuardedBuffer::from_slice(&b));
    let mut d = GuardedBuffer::<f32>::new(128);
    run(
        &__KERNEL_mma_ldmatrix,
        1,
        32,
        768,
        &params![ga.as_ptr(), gb.as_ptr(), d.as_mut_ptr()],
    );
    let value = |x: &u16| f16::from_bits(*x).to_f64();
    let a: Vec<f64> = a.iter().map(value).collect();
    close(
        d.as_slice(),
        &reference(16, 8, 16, &a, |k, n| value(&b[k * 8 + n]), &[0.0; 128]),
    );
}

#[test]
fn matrix_loads_of_each_width() {
    // Element (row, column) of matrix m is 64 m + 8 row + column.
    let x: Vec<u16> = (0..256).collect();
    let input = GuardedBuffer::from_slice(&x);
    let mut out = GuardedBuffer::<u32>::new(256);
    run(
        &__KERNEL_matrix_loads,
        1,
        32,
        512,
        &params![input.as_ptr(), out.as_mut_ptr()],
    );
    for (lane, words) in out.as_slice().chunks(8).enumerate() {
        let (g, t) = (lane as u32 / 4, lane as u32 % 4);
        let plain = |m: u32| (64 * m + 8 * g + 2 * t) | (64 * m + 8 * g + 2 * t + 1) << 16;
        let turned = |m: u32| (64 * m + 16 * t + g) | (64 * m + 16 * t + 8 + g) << 16;
        let expected = [
            plain(0),
            turned(0),
            plain(0),
            plain(1),
            turned(0),
            turned(1),
            turned(2),
            turned(3),
        ];
        assert_eq!(words, expected, "lane {lane}");
    }
}

#[test]
fn copies_land_at_their_wait_and_not_before() {
    let x: Vec<u32> = (1..=256).collect();
    let input = GuardedBuffer::from_slice(&x);
    for (wait, first, second) in [(0u32, false, false), (1, true, false), (2, true, true)] {
        let mut out = GuardedBuffer::<u32>::new(512);
        run(
            &__KERNEL_copies,
            1,
            64,
            2048,
            &params![input.as_ptr(), out.as_mut_ptr(), wait, 6u32],
        );
        for (i, words) in out.as_slice().chunks(8).enumerate() {
            let from = 4 * (63 - i as u32) + 1;
            let poison = [u32::MAX; 4];
            let all = [from, from + 1, from + 2, from + 3];
            // Six bytes were read, the rest is zero.
            let part = [from, (from + 1) & 0xffff, 0, 0];
            assert_eq!(
                words[..4],
                if first { all } else { poison },
                "wait {wait}, thread {i}"
            );
            assert_eq!(
                words[4..],
                if second { part } else { poison },
                "wait {wait}, thread {i}"
            );
        }
    }
}

#[test]
fn loads_and_stores_of_each_kind() {
    let x: Vec<u32> = (0..32u32)
        .map(|i| 0x0102_0304u32.wrapping_mul(i + 1))
        .collect();
    let input = GuardedBuffer::from_slice(&x);
    let mut out = GuardedBuffer::<u32>::new(56);
    run(
        &__KERNEL_loads,
        1,
        1,
        64,
        &params![input.as_ptr(), out.as_mut_ptr()],
    );
    let found = out.as_slice();
    assert_eq!(found[..32], x);
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let short = |i: usize| u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
    let expected = [
        u32::from(bytes[1]),
        short(3),
        u32::from(bytes[2]),
        short(5),
        x[3],
        x[3],
        x[3],
        x[5],
        x[6],
    ];
    assert_eq!(found[32..41], expected);
    assert_eq!(found[41..47], [7, 8, 0x0807, 0x0605, -2i32 as u32, 35]);
    assert_eq!(found[48..50], [1, 2]);
    assert_eq!(found[52..56], [3, 4, 5, 6]);
}

#[test]
fn halves_and_words() {
    let mut random = Random(6);
    let n = 2000;
    // Both arbitrary bits and pairs of ordinary halves.
    let mut make = |i: usize| {
        let pair = [random.float(-8.0, 8.0), random.float(-8.0, 8.0)]
            .map(|x| u32::from(f16::from_f32(x).to_bits()));
        if i.is_multiple_of(2) {
            pair[0] | pair[1] << 16
        } else {
            random.word() & 0xbfff_bfff
        }
    };
    let (a, b): (Vec<u32>, Vec<u32>) = (0..n).map(|i| (make(i), make(i))).unzip();
    let (ga, gb) = (GuardedBuffer::from_slice(&a), GuardedBuffer::from_slice(&b));
    let mut out = GuardedBuffer::<u32>::new(16 * n);
    run(
        &__KERNEL_words,
        16,
        128,
        0,
        &params![ga.as_ptr(), gb.as_ptr(), out.as_mut_ptr(), n as u32],
    );
    for (i, words) in out.as_slice().chunks(16).enumerate() {
        let (a, b) = (a[i], b[i]);
        let signed = |x: u32| x.to_le_bytes().map(|b| i64::from(b as i8));
        let unsigned = |x: u32| x.to_le_bytes().map(i64::from);
        let dot = |x: [i64; 4], y: [i64; 4]| 7 + (0..4).map(|i| x[i] * y[i]).sum::<i64>();
        assert_eq!(words[0] as i32 as i64, dot(signed(a), signed(b)));
        assert_eq!(words[1] as i32 as i64, dot(unsigned(a), signed(b)));
        assert_eq!(words[2] as i32 as i64, dot(unsigned(a), unsigned(b)));
        let c = 0x1234_5678;
        assert_eq!(words[3], a & b | a & c | b & c);
        let (x, y) = (a.to_le_bytes(), b.to_le_bytes());
        let sign = if y[3] & 0x80 != 0 { 0xff } else { 0 };
        // 0xfa61 picks, from the lowest byte up: byte 1, byte 6, the sign of byte 2, the sign of byte 7.
        let sign2 = if x[2] & 0x80 != 0 { 0xff } else { 0 };
        assert_eq!(words[4].to_le_bytes(), [x[1], y[2], sign2, sign]);
        assert_eq!(
            words[5].to_le_bytes(),
            std::array::from_fn::<u8, 4, _>(|i| x[i].wrapping_sub(y[i]))
        );
        for shift in [0, 16] {
            let (x, y) = (
                f16::from_bits((a >> shift) as u16),
                f16::from_bits((b >> shift) as u16),
            );
            let (fx, fy) = (x.to_f64(), y.to_f64());
            let expected = [fx * fy + fx, fx + fy, fx - fy, fx * fy, fx.max(fy)];
            for (word, expected) in words[6..11].iter().zip(expected) {
                let found = f16::from_bits((word >> shift) as u16);
                let expected = f16::from_f64(expected);
                let same =
                    found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                // Zero has two signs; which one a maximum of both gives is open.
                assert!(
                    same || found == expected,
                    "{x} {y}: {found}, expected {expected}"
                );
            }
        }
        let (fa, fb) = (f32::from_bits(a), f32::from_bits(b));
        let bits = |x: f32| u32::from(f16::from_f32(x).to_bits());
        let brain = |x: f32| u32::from(bf16::from_f32(x).to_bits());
        assert_eq!(words[11], bits(fa) | bits(fb) << 16);
        assert_eq!(words[12], brain(fa) | brain(fb) << 16);
        assert_eq!(words[13], bits(fa) | brain(fa) << 16);
        assert_eq!(words[14], f16::from_bits(a as u16).to_f32().to_bits());
        assert_eq!(
            words[15],
            ((u64::from(b) << 32 | u64::from(a)) >> (b & 31)) as u32
        );
    }
}

/// The distance in units of the last place of the expected value.
fn ulps(found: f32, expected: f64) -> f64 {
    let nearest = expected as f32;
    if found == nearest || found.is_nan() && nearest.is_nan() {
        return 0.0;
    }
    let next = f32::from_bits((nearest.abs().to_bits()).max(0x0080_0000) + 1);
    let ulp = f64::from(next) - f64::from(f32::from_bits(nearest.abs().to_bits().max(0x0080_0000)));
    (f64::from(found) - expected).abs() / ulp
}

fn evaluate(which: u32, x: &[f32], y: &[f32]) -> Vec<f32> {
    let (gx, gy) = (GuardedBuffer::from_slice(x), GuardedBuffer::from_slice(y));
    let mut out = GuardedBuffer::<f32>::new(x.len());
    let n = x.len() as u32;
    run(
        &__KERNEL_functions,
        n.div_ceil(128),
        128,
        0,
        &params![gx.as_ptr(), gy.as_ptr(), out.as_mut_ptr(), n, which],
    );
    out.as_slice().to_vec()
}

fn check_ulps(name: &str, which: u32, x: &[f32], limit: f64, exact: impl Fn(f64) -> f64) {
    let found = evaluate(which, x, &vec![0.0; x.len()]);
    let mut worst = (0.0, 0.0);
    for (x, f) in x.iter().zip(found) {
        let error = ulps(f, exact(f64::from(*x)));
        assert!(!error.is_nan(), "{name}({x}) = {f}");
        if error > worst.0 {
            worst = (error, *x);
        }
    }
    println!("{name}: {:.3} ulp at {:e}", worst.0, worst.1);
    assert!(
        worst.0 <= limit,
        "{name}({:e}) is off by {:.3} units in the last place",
        worst.1,
        worst.0
    );
}

#[test]
fn elementary_functions_are_good_to_two_units() {
    let mut random = Random(7);
    let n = 40_000;
    let mut spread =
        |low: f32, high: f32| -> Vec<f32> { (0..n).map(|_| random.float(low, high)).collect() };
    let mut x = spread(-87.0, 88.7);
    x.extend(spread(-1.0, 1.0));
    x.extend([
        0.0,
        -0.0,
        89.0,
        200.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        -200.0,
        -104.5,
        f32::NAN,
    ]);
    check_ulps("exp", 0, &x, 2.0, f64::exp);
    let mut x = spread(1e-6, 4.0);
    x.extend(spread(0.5, 2.0));
    x.extend(spread(1.0, 1e30));
    x.extend([
        0.0,
        1.0,
        f32::INFINITY,
        1e-42,
        f32::MIN_POSITIVE,
        f32::MAX,
        -1.0,
        f32::NAN,
    ]);
    check_ulps("ln", 1, &x, 2.0, f64::ln);
    // What RoPE asks for: angles up to a hundred thousand radians, and beyond.
    let mut x = spread(-1e5, 1e5);
    x.extend(spread(-8.0, 8.0));
    x.extend(spread(-1e9, 1e9));
    x.extend((0..200_000).step_by(7).map(|i| i as f32));
    x.extend((1..60_000).map(|i| (f64::from(i) * std::f64::consts::FRAC_PI_2) as f32));
    check_ulps("sin", 2, &x, 2.0, f64::sin);
    check_ulps("cos", 3, &x, 2.0, f64::cos);
    let mut x = spread(-10.0, 10.0);
    x.extend(spread(-0.6, 0.6));
    x.extend([
        0.0,
        1e-20,
        40.0,
        -300.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ]);
    check_ulps("tanh", 4, &x, 2.0, f64::tanh);
    let x = spread(0.0, 1e6);
    check_ulps("sqrt", 5, &x, 0.5, f64::sqrt);
    check_ulps("rsqrt", 6, &x[1..], 2.0, |x| 1.0 / x.sqrt());
}

#[test]
fn powers_are_good_to_one_unit() {
    let mut random = Random(8);
    let mut x: Vec<f32> = (0..40_000).map(|_| random.float(0.0, 50.0)).collect();
    let mut y: Vec<f32> = (0..40_000).map(|_| random.float(-30.0, 30.0)).collect();
    // The bases and exponents of RoPE's frequencies.
    for base in [1e4f32, 5e5, 1e6] {
        for i in 0..64 {
            x.push(base);
            y.push(-2.0 * i as f32 / 128.0);
        }
    }
    x.extend([0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
    y.extend([2.0, -1.0, 5e7, 0.0, 127.5, 1000.0, -1000.0]);
    let found = evaluate(7, &x, &y);
    for ((x, y), f) in x.iter().zip(&y).zip(found) {
        let error = ulps(f, f64::from(*x).powf(f64::from(*y)));
        assert!(
            error <= 1.0,
            "powf({x}, {y}) = {f} is off by {error:.3} units"
        );
    }
}

#[test]
fn simple_functions() {
    let x = [-2.5f32, -0.5, 0.5, 1.5, 2.5, 1e10, f32::NAN];
    let y = [1.25f32, -1.25, 3.0, f32::NAN, 0.0, -0.5, 1.0];
    assert_eq!(
        evaluate(13, &x, &y),
        [-2.0, 0.0, 0.0, 2.0, 2.0, 2_147_483_648.0, 0.0]
    );
    assert_eq!(
        evaluate(12, &x[..3], &y[..3]),
        [-1.25 + 2.5 + 1.0, -1.75 + 0.5 - 2.0, 3.5 + 0.5 + 3.0]
    );
    assert_eq!(
        evaluate(9, &[1.0 + f32::EPSILON], &[1.0 - f32::EPSILON])[0],
        2.0
    );
}

/// Boxes inside both matrices, across their edges, and outside.
#[test]
fn a_warpgroup_multiplies_boxes() {
    use cuda_std::tensor::{Copied, TensorMap, Tiling};
    let mut random = Random(11);
    let (rows, cols, stride) = (150usize, 96usize, 104usize);
    let mut matrix = || -> Vec<u16> {
        let value = |_| half::f16::from_f32(random.float(-2.0, 2.0)).to_bits();
        (0..rows * stride).map(value).collect()
    };
    let (a, b) = (matrix(), matrix());
    let map = |m: &[u16], box_rows: u32| {
        TensorMap::emulated(&Tiling {
            address: m.as_ptr() as u64,
            rows: rows as u32,
            cols: cols as u32,
            stride: 2 * stride as u64,
            box_rows,
            copy: Copied::Box,
        })
    };
    for (row, col) in [(0, 0), (5, 32), (100, 64), (149, 0), (200, 0), (0, 96)] {
        let mut out = GuardedBuffer::<f32>::new(64 * 128);
        let boxes = Boxes {
            a: map(&a, 64),
            b: map(&b, 128),
            row: row as u32,
            col: col as u32,
            out: out.as_mut_ptr(),
        };
        run(
            &__KERNEL_box_product,
            1,
            128,
            2048 + 192 * 128,
            &params![boxes],
        );
        let element = |m: &[u16], r: usize, c: usize| {
            if row + r < rows && col + c < cols {
                half::f16::from_bits(m[(row + r) * stride + col + c]).to_f32()
            } else {
                0.0
            }
        };
        for (i, found) in out.as_slice().iter().enumerate() {
            let expected = (0..64).fold(0.0f32, |sum, k| {
                sum + element(&a, i / 128, k) * element(&b, i % 128, k)
            });
            assert_eq!(
                *found,
                expected,
                "row {}, column {} from ({row}, {col})",
                i / 128,
                i % 128
            );
        }
    }
}
