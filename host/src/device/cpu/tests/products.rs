//! Products of every type at every level.

use super::super::linear::{Input, Scratch};
use super::super::testing::{Random, values};
use super::super::*;
use super::file_of;
use gguf::GgmlType;

/// Rows that 15 bits hold without loss: in each 32 elements multiples of a power of two, 16256 of it
/// among them.
fn lossless(random: &mut Random, n: usize) -> Vec<f32> {
    let mut x = Vec::with_capacity(n);
    while x.len() < n {
        let d = [1.0 / 512.0, 1.0 / 256.0, 1.0 / 8192.0][random.below(3)];
        let at = random.below(32);
        x.extend((0..32).map(|i| {
            let q = if i == at {
                16_256.0
            } else {
                random.below(2 * 16_256 + 1) as f32 - 16_256.0
            };
            d * q
        }));
    }
    x.truncate(n);
    x
}

/// Holds the products of `data`, a matrix, and of the rows that `inputs` gives to the reference.
fn check_products(
    ty: GgmlType,
    (cols, rows): (usize, usize),
    data: Vec<u8>,
    exact: bool,
    mut inputs: impl FnMut(usize) -> Vec<f32>,
) {
    let w = values(ty, &data);
    let file = file_of(&[("w", [cols as u64, rows as u64], ty, data)]);
    let weight = || Weight::new(file.require("w").unwrap(), 0..rows, &file).unwrap();
    let (mut pool, mut arena) = (Pool::new(1).unwrap(), Arena::default());
    // As they lie in the file, and where there is another layout, in that too.
    let mut weights = vec![];
    for level in Level::available() {
        weights.push((level, weight()));
        let mut copied = weight();
        let mut scratch = [Scratch::default()];
        if copied
            .interleave(level, &mut pool, &mut scratch, &mut arena)
            .unwrap()
        {
            weights.push((level, copied));
        }
    }
    for n in [1, 2, 7, 9, 131] {
        let x = inputs(n * cols);
        for (level, weight) in &weights {
            let (level, copied) = (*level, weight.is_copied());
            let views = [weight.view(exact).unwrap()];
            let mut input = Input::default();
            input.fill(level, &mut pool, (n, cols), &views, |row, _| {
                Some(&x[row * cols..(row + 1) * cols])
            });
            let mut scratch = Scratch::default();
            let mut seen = 0;
            for tile in 0..views[0].tiles() {
                views[0].multiply(level, tile, &input, n, &mut scratch);
                for (i, row) in views[0].tile_rows(tile).enumerate() {
                    for (at, out) in scratch.out.iter().enumerate() {
                        let terms = w[row * cols..(row + 1) * cols]
                            .iter()
                            .zip(&x[at * cols..(at + 1) * cols])
                            .map(|(&w, &x)| f64::from(w) * f64::from(x));
                        let (mut want, mut size) = (0.0, 0.0);
                        for term in terms {
                            want += term;
                            size += term.abs();
                        }
                        let error = (f64::from(out[i]) - want).abs();
                        assert!(
                            error <= 2e-6 * size + 1e-9,
                            "{ty} {cols}x{rows} by {n}, {level:?}, exact {exact}, copied \
                             {copied}: row {row} of {at}: {} for {want}",
                            out[i]
                        );
                        seen += 1;
                    }
                }
            }
            assert_eq!(seen, rows * n);
        }
    }
}

#[test]
fn quantised_products_equal_the_reference() {
    let mut random = Random::new(7);
    for &ty in quant::TYPES {
        let block = ty.block_len();
        for (blocks, rows) in [
            (1, 1),
            (2, 16),
            (3, 19),
            (if block == 32 { 28 } else { 5 }, 33),
        ] {
            for exact in [false, true] {
                let cols = blocks * block;
                let data = random.weights(ty, rows * cols);
                check_products(ty, (cols, rows), data, exact, |n| lossless(&mut random, n));
            }
        }
    }
}

#[test]
fn parts_of_a_copy_are_the_rows_that_they_say() {
    let mut random = Random::new(10);
    let (cols, rows, ty) = (96, 83, GgmlType::Q5_1);
    let data = random.weights(ty, rows * cols);
    let file = file_of(&[("w", [cols as u64, rows as u64], ty, data)]);
    // Rows from the tensor's middle, as experts' are.
    let load = || Weight::new(file.require("w").unwrap(), 3..rows, &file).unwrap();
    let (level, mut pool) = (Level::best(), Pool::new(2).unwrap());
    let mut scratch = [Scratch::default(), Scratch::default()];
    let (plain, mut copied) = (load(), load());
    copied
        .interleave(level, &mut pool, &mut scratch, &mut Arena::default())
        .unwrap();
    for n in [1, 5] {
        let x = lossless(&mut random, n * cols);
        for part in [0..80, 0..7, 16..48, 32..45, 5..31, 64..80] {
            let [want, got] = [&plain, &copied].map(|weight| {
                let view = weight.view(false).unwrap().part(part.clone());
                let mut input = Input::default();
                input.fill(level, &mut pool, (n, cols), &[view], |row, _| {
                    Some(&x[row * cols..(row + 1) * cols])
                });
                let mut products = Vec::new();
                for tile in 0..view.tiles() {
                    view.multiply(level, tile, &input, n, &mut scratch[0]);
                    for out in &scratch[0].out {
                        products.extend_from_slice(&out[..view.tile_rows(tile).len()]);
                    }
                }
                products
            });
            for (want, got) in want.iter().zip(&got) {
                let error = (want - got).abs();
                assert!(
                    error <= 1e-4 * want.abs().max(1.0),
                    "{part:?} by {n}: {got} for {want}"
                );
            }
        }
    }
}

#[test]
fn the_greatest_sums_fit() {
    let (cols, rows) = (96, 17);
    for weight in [127i8, -128] {
        let block: Vec<u8> = [0x00, 0x3c] // 1 as f16
            .into_iter()
            .chain([weight as u8; 32])
            .collect();
        let data = block.repeat(cols / 32 * rows);
        // High parts of 127; low parts of 64 and of -64 beside one of those.
        for x in [16_256.0, 16_192.0, 16_064.0] {
            for sign in [1.0, -1.0] {
                check_products(GgmlType::Q8_0, (cols, rows), data.clone(), false, |n| {
                    let greatest = |i| if i % 32 == 0 { 16_256.0 } else { x };
                    (0..n).map(|i| sign * greatest(i)).collect()
                });
            }
        }
    }
}

#[test]
fn plain_products_equal_the_reference() {
    let mut random = Random::new(8);
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        for (cols, rows) in [(1, 1), (5, 17), (16, 16), (31, 3), (100, 33), (896, 16)] {
            let data = random.weights(ty, rows * cols);
            check_products(ty, (cols, rows), data, false, |n| lossless(&mut random, n));
        }
    }
}

#[test]
fn a_row_of_nothing_but_zeros_or_tiny_values_gives_zeros() {
    let mut random = Random::new(9);
    let file = file_of(&[(
        "w",
        [64, 8],
        GgmlType::Q5_0,
        random.weights(GgmlType::Q5_0, 512),
    )]);
    for level in Level::available() {
        for value in [0.0, 1e-38, f32::MIN_POSITIVE / 4.0] {
            let mut cpu = Cpu::with_level(Some(1), false, level).unwrap();
            let tensor = file.require("w").unwrap();
            let all = 0..tensor.rows() as usize;
            let weight = cpu.load(tensor, all, &file).unwrap();
            let input = cpu.upload(&[value; 64]).unwrap();
            let mut out = cpu.upload(&[0.0; 8]).unwrap();
            let batch = Batch {
                tokens: vec![0],
                spans: vec![],
                outputs: vec![],
                ..Batch::default()
            };
            cpu.step(&batch, &mut |cpu| {
                cpu.linear_add(
                    Linear {
                        weight: &weight,
                        bias: None,
                        adapters: &[],
                    },
                    &input,
                    &Residual::PLAIN,
                    &mut out,
                )
            })
            .unwrap();
            assert!(
                out.0.iter().all(|x| x.abs() < 1e-30),
                "{level:?} {value}: {:?}",
                out.0
            );
        }
    }
}
