use super::linear::{Input, Scratch};
use super::testing::Random;
use super::*;
use gguf::{GgmlType, Writer};
#[test]
#[ignore]
fn speed() {
    let mut random = Random::new(1);
    let types = quant::TYPES.iter().copied();
    for ty in types.chain([GgmlType::F16]) {
        let (cols, rows) = (if ty.block_len() == 256 { 1024 } else { 896 }, 256);
        let data = random.weights(ty, rows * cols);
        let mut writer = Writer::new();
        writer.tensor("w", &[cols as u64, rows as u64], ty).unwrap();
        let mut p = writer.begin(Vec::new()).unwrap();
        p.write(&data).unwrap();
        let file = Arc::new(Gguf::from_bytes("x", p.finish().unwrap()).unwrap());
        let mut weight = Weight::new(file.require("w").unwrap(), 0..rows, &file).unwrap();
        weight
            .interleave(
                Level::best(),
                &mut Pool::new(1).unwrap(),
                &mut [Scratch::default()],
                &mut Arena::default(),
            )
            .unwrap();
        for n in [1usize, 2, 3, 4, 5, 6, 8, 128] {
            let x = random.normals(n * cols);
            let level = Level::best();
            let mut pool = Pool::new(1).unwrap();
            let views = [weight.view(false).unwrap()];
            let mut input = Input::default();
            input.fill(level, &mut pool, (n, cols), &views, |row, _| {
                Some(&x[row * cols..(row + 1) * cols])
            });
            let mut scratch = Scratch::default();
            let mut best = f64::MAX;
            for _ in 0..if n == 128 { 100 } else { 2000 } {
                let t = std::time::Instant::now();
                for tile in 0..views[0].tiles() {
                    views[0].multiply(level, tile, &input, n, &mut scratch);
                }
                best = best.min(t.elapsed().as_secs_f64());
            }
            println!(
                "{ty:6} n {n:3}: {:6.1} GB/s {:7.1} GMAC/s",
                data.len() as f64 / best / 1e9,
                (n * cols * rows) as f64 / best / 1e9
            );
        }
    }
}
