//! Mixtures of experts: rows are routed, and each expert multiplies those that picked it, together.

use super::pool::Parts;
use super::{Buffer, Cpu, Rows, bias, norm_row};
use crate::device::Experts;
use crate::error::Result;

/// What experts need between two steps, kept from one use to the next.
#[derive(Default)]
pub(super) struct Scratch {
    scores: Vec<f32>,
    normed: Vec<f32>,
    hidden: Vec<f32>,
    products: Vec<f32>,
    out: Vec<f32>,
}

/// The experts that one row picks, and their weights: the greatest scores, the lower number first among
/// equals.
fn route(scores: &[f32], used: usize, renormalise: bool) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let max = scores[order[0]];
    let weight = |i: usize| (scores[i] - max).exp();
    let picked = &order[..used];
    let total: f32 = if renormalise { picked } else { &order[..] }
        .iter()
        .map(|&i| weight(i))
        .sum();
    picked.iter().map(|&i| (i, weight(i) / total)).collect()
}

impl Cpu {
    pub(super) fn run_experts(&mut self, op: &Experts<'_, Self>, x: &mut Buffer) -> Result<()> {
        let n = self.rows();
        let cols = op.router.weight.cols;
        let mut s = std::mem::take(&mut self.experts);
        s.scores.resize(n * op.count, 0.0);
        let outs = [Parts::new(&mut s.scores)];
        self.linears(&[op.router], Rows::Normed(x, &op.norm), &outs, false)?;
        let mut picks = vec![Vec::new(); op.count];
        for (row, scores) in s.scores.chunks_exact(op.count).take(n).enumerate() {
            for (expert, weight) in route(scores, op.used, op.renormalise) {
                picks[expert].push((row, weight));
            }
        }
        // Once for all experts.
        s.normed.resize(n * cols, 0.0);
        for (x, out) in x.0.chunks_exact(cols).zip(s.normed.chunks_exact_mut(cols)) {
            match &op.norm {
                Some(norm) => norm_row(self.level, norm, x, 0..cols, out),
                None => out.copy_from_slice(x),
            }
        }
        s.out.clear();
        s.out.resize(n * cols, 0.0);
        let width = op.up.weight.rows / op.count;
        let gate_up = [
            (op.gate.weight.view(self.exact)?, bias(&op.gate)),
            (op.up.weight.view(self.exact)?, bias(&op.up)),
        ];
        let down = (op.down.weight.view(self.exact)?, bias(&op.down));
        for (expert, picks) in picks.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            let part = |rows: usize| expert * rows..(expert + 1) * rows;
            let own = gate_up.map(|(view, bias)| {
                let rows = part(width);
                (view.part(rows.clone()), bias.map(|bias| &bias[rows]))
            });
            let m = picks.len();
            self.input.fill(
                self.level,
                &mut self.pool,
                (m, cols),
                &own.map(|v| v.0),
                |i, _| {
                    let row = picks[i].0;
                    Some(&s.normed[row * cols..(row + 1) * cols])
                },
            );
            s.hidden.resize(m * width, 0.0);
            self.gate_up(&own, op.activation, m, Parts::new(&mut s.hidden));

            let rows = part(cols);
            let view = [down.0.part(rows.clone())];
            let bias = down.1.map(|bias| &bias[rows]);
            self.input
                .fill(self.level, &mut self.pool, (m, width), &view, |i, _| {
                    Some(&s.hidden[i * width..(i + 1) * width])
                });
            s.products.resize(m * cols, 0.0);
            let products = Parts::new(&mut s.products);
            self.products(&view, m, |_, rows, tile| {
                for (at, tile) in tile.iter().enumerate() {
                    // SAFETY: a tile's columns of a row are written by one thread.
                    let out = unsafe { products.get(at * cols + rows.start..at * cols + rows.end) };
                    out.copy_from_slice(&tile[..rows.len()]);
                }
            });
            for (&(row, weight), products) in picks.iter().zip(s.products.chunks_exact(cols)) {
                let out = &mut s.out[row * cols..(row + 1) * cols];
                for (i, (out, y)) in out.iter_mut().zip(products).enumerate() {
                    *out += weight * (y + bias.map_or(0.0, |bias| bias[i]));
                }
            }
        }
        let mut out = std::mem::take(&mut s.out);
        self.add_residual(&op.residual, &mut out, x, cols);
        s.out = out;
        self.experts = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::route;

    #[test]
    fn the_greatest_scores_are_picked_and_weighted() {
        let scores = [1.0, 3.0, 2.0, 3.0];
        let picked = route(&scores, 2, true);
        assert_eq!(picked, [(1, 0.5), (3, 0.5)]);
        let all: f32 = scores.iter().map(|s| (s - 3.0f32).exp()).sum();
        let picked = route(&scores, 3, false);
        assert_eq!(picked.iter().map(|p| p.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert!((picked[2].1 - (-1.0f32).exp() / all).abs() < 1e-7);
    }
}
