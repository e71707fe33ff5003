//! Which blocks attend in a decode step, to how many splits of the tokens, and who merges these.

use super::program::is_product;
use kernels::decode::{self, MAX_SPLITS, Op, Shares, WARPS, kind};

/// What decides how attention is split.
#[derive(Clone, Copy, Default)]
pub(super) struct Attending {
    /// What it is cut into besides the tokens, where these are split.
    pub(super) pieces: u32,
    /// Tasks of the product before it.
    pub(super) before: u32,
}

/// From so many tokens on they are split among blocks: merging what these find takes as long as a block takes for the rest.
const SPLIT_FROM: usize = 288;
/// The same where every block has a task of the product before: so many weights come in meanwhile that merging holds up less.
const SPLIT_FROM_BESIDE_WEIGHTS: usize = 128;

impl Attending {
    /// Splits of so many tokens; one where they are few, else such that every one of `blocks` blocks takes a piece, or every one that has no task of the product
    /// before, and has not to end that first.
    pub(super) fn splits(&self, tokens: usize, blocks: u32) -> u32 {
        /// What a block's warps take at a time.
        const TOKENS: u32 = 16 * WARPS;
        /// And splits that a warp merges at a time.
        const LANES: u32 = 32;
        let from = match self.before >= blocks {
            true => SPLIT_FROM_BESIDE_WEIGHTS,
            false => SPLIT_FROM,
        };
        if tokens < from {
            return 1;
        }
        // A piece at least, and each at least a round of the warps; in rounds, and beside them what the product's end costs.
        let of = |blocks: u32, later: u32| {
            let splits = (blocks / self.pieces.max(1)).clamp(1, MAX_SPLITS);
            // A few more than who merges them takes at a time cost it as long as all of these.
            let over = splits % LANES;
            let splits = if splits > LANES && over <= splits / 10 {
                splits - over
            } else {
                splits
            };
            let rounds = (tokens as u32).div_ceil(splits).div_ceil(TOKENS);
            (rounds + later, splits)
        };
        let all = of(blocks, 2);
        let apart = blocks.saturating_sub(self.before);
        if apart < self.pieces {
            return all.1;
        }
        all.min(of(apart, 0)).1
    }
}

/// Gives attentions the blocks that take their pieces and merge their splits.
///
/// Pieces go to blocks that have no task of the product before, where there are enough, so that they wait for the query and for nothing
/// else. The product after it, where that gives no block more of its tasks, leaves out those that have it end last: who merges splits, or
/// attends where there are none.
pub(super) fn share_attention(ops: &mut [Op], blocks: u32) {
    for i in 0..ops.len() {
        let mut op = ops[i];
        if op.kind != kind::ATTEND {
            continue;
        }
        let group = op.heads / op.cache.kv_heads.max(1);
        let split = op.splits > 1;
        let pieces =
            decode::attend_pieces(op.cache.kv_heads, group, op.cache.head_dim, op.ringed());
        let pieces = pieces * op.splits.max(1);
        let mut apart = pieces < blocks;
        if let Some(before) = i.checked_sub(1).map(|before| &mut ops[before])
            && before.kind == kind::QKV
            && apart
        {
            apart = before.count_tasks() + pieces <= blocks;
            if apart {
                before.shares = Shares::of(0, 0, blocks - pieces);
            }
        }
        let first = if apart { blocks - pieces } else { 0 };
        op.first_block = first;
        op.mergers = blocks;
        if split {
            op.inverse_splits = (1u64 << 32).div_ceil(u64::from(op.splits)) as u32;
        }
        let next = ops.get_mut(i + 1);
        if let Some(next) = next.filter(|next| is_product(next) && next.cut == 0) {
            let tasks = next.count_tasks();
            let needed = tasks.div_ceil(tasks.div_ceil(blocks));
            let tasks = op.heads * (op.cache.head_dim / decode::OCTET);
            let enough = |mergers: u32| mergers * WARPS >= tasks;
            if !split {
                if pieces <= blocks / 8 {
                    let behind = if apart { 0 } else { pieces };
                    next.shares = Shares::of(0, behind, blocks - pieces);
                }
            } else if apart && needed <= pieces && enough(first) {
                next.shares = Shares::of(0, first, pieces);
                op.mergers = first;
            } else if enough(blocks - needed) {
                next.shares = Shares::of(0, blocks - needed, needed);
                op.mergers = blocks - needed;
            }
        }
        ops[i] = op;
    }
}

#[cfg(test)]
mod tests {
    use super::super::program::tests::{BLOCKS, matrix};
    use super::*;
    use gguf::GgmlType;

    /// A layer's attention with the products around it, as planned: of so many rows of queries, keys and values, and of the residual.
    fn around_attention(rows: [u32; 3], out: u32, head_dim: u32, splits: u32) -> [Op; 3] {
        let m = |rows, cols| matrix(GgmlType::Q4_K, rows, cols);
        let [q, k, v] = rows;
        let before = Op {
            kind: kind::QKV,
            matrices: [m(q, out), m(k, out), m(v, out)],
            cache: kernels::rows::CacheLayer {
                kv_heads: k / head_dim,
                head_dim,
                ..decode::NO_OP.cache
            },
            ..decode::NO_OP
        };
        let attention = Op {
            kind: kind::ATTEND,
            heads: q / head_dim,
            splits,
            matrices: decode::NO_OP.matrices,
            ..before
        };
        let after = Op {
            kind: kind::PRODUCT,
            matrices: [
                m(out, q),
                kernels::types::NO_MATRIX,
                kernels::types::NO_MATRIX,
            ],
            ..decode::NO_OP
        };
        let mut ops = [before, attention, after];
        share_attention(&mut ops, BLOCKS);
        ops
    }

    #[test]
    fn attention_is_for_blocks_that_have_not_to_end_something_else_first() {
        // Qwen 2.5 0.5B, in one split and in as many as there are blocks without queries, keys and values.
        let attending = Attending {
            pieces: 2,
            before: 72,
        };
        assert_eq!(attending.splits(8000, BLOCKS), 30);
        assert_eq!(
            [287, 288].map(|tokens| attending.splits(tokens, BLOCKS)),
            [1, 30]
        );
        for (splits, pieces) in [(1, 2), (30, 60)] {
            let [before, attention, after] = around_attention([896, 128, 128], 896, 64, splits);
            let first = BLOCKS - pieces;
            assert_eq!(attention.first_block, first);
            assert_eq!((before.shares.first(), before.shares.blocks()), (0, first));
            let behind = if splits == 1 {
                (0, first)
            } else {
                (first, pieces)
            };
            assert_eq!((after.shares.first(), after.shares.blocks()), behind);
        }
        let [_, attention, _] = around_attention([896, 128, 128], 896, 64, 30);
        assert_eq!(attention.mergers, 72);
        // So many tokens that all blocks are faster.
        assert_eq!(attending.splits(40_000, BLOCKS), 64);
        // 8B: all have tasks of every product.
        let attending = Attending {
            pieces: 8,
            before: 384,
        };
        assert_eq!(attending.splits(8000, BLOCKS), 16);
        assert_eq!(
            [127, 128].map(|tokens| attending.splits(tokens, BLOCKS)),
            [1, 16]
        );
        let [before, attention, after] = around_attention([4096, 1024, 1024], 4096, 128, 16);
        assert_eq!((attention.first_block, attention.mergers), (0, BLOCKS));
        assert_eq!([before.shares, after.shares], [Shares::NONE; 2]);
    }

    #[test]
    fn a_split_is_found_without_a_division() {
        for splits in 2..=MAX_SPLITS {
            let inverse = (1u64 << 32).div_ceil(u64::from(splits));
            for n in (0..100_000).chain([1 << 22, (1 << 22) + splits - 1]) {
                assert_eq!(
                    ((u64::from(n) * inverse) >> 32) as u32,
                    n / splits,
                    "{n} / {splits}"
                );
            }
        }
    }
}
