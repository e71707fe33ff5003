//! The KV cache as the scheduler sees it: a pool of fixed blocks, and a table of blocks for each
//! sequence (paged attention, arXiv:2309.06180).

use crate::device::BLOCK_TOKENS;
use crate::model::Ring;

/// The blocks of one cache. Every block is either free or in exactly one [`BlockTable`].
#[derive(Debug)]
pub struct BlockPool {
    /// A stack; the lowest numbers come out first, so that a lone sequence lies in order.
    free: Vec<u32>,
    total: usize,
    /// The blocks of windows: free ones, and how many a sequence takes at most.
    free_ring: Vec<u32>,
    ring_len: usize,
}

impl BlockPool {
    pub fn new(total: usize) -> Self {
        Self {
            free: (0..total as u32).rev().collect(),
            total,
            free_ring: Vec::new(),
            ring_len: 0,
        }
    }

    /// With a part for layers that see a window only.
    pub fn with_ring(total: usize, ring: Option<Ring>) -> Self {
        let (len, blocks) = ring.map_or((0, 0), |ring| (ring.len, ring.blocks));
        Self {
            free_ring: (0..blocks as u32).rev().collect(),
            ring_len: len,
            ..Self::new(total)
        }
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }
}

/// The blocks of one sequence, in token order.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    ring: Vec<u32>,
}

impl BlockTable {
    /// Takes blocks from `pool` until the table holds `tokens`. Takes none and returns false where
    /// the pool has too few.
    #[must_use]
    pub fn grow(&mut self, tokens: usize, pool: &mut BlockPool) -> bool {
        let missing = tokens
            .div_ceil(BLOCK_TOKENS)
            .saturating_sub(self.blocks.len());
        let windowed = tokens.div_ceil(BLOCK_TOKENS).min(pool.ring_len);
        let missing_ring = windowed.saturating_sub(self.ring.len());
        if missing > pool.free.len() || missing_ring > pool.free_ring.len() {
            return false;
        }
        let kept = pool.free_ring.len() - missing_ring;
        self.ring.extend(pool.free_ring.drain(kept..).rev());
        let kept = pool.free.len() - missing;
        self.blocks.extend(pool.free.drain(kept..).rev());
        true
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Gives every block back.
    pub fn release(&mut self, pool: &mut BlockPool) {
        pool.free.extend(self.blocks.drain(..).rev());
        pool.free_ring.extend(self.ring.drain(..).rev());
    }

    /// The blocks that hold the window, in a ring; see [`crate::device::Span::ring`].
    pub fn ring(&self) -> &[u32] {
        &self.ring
    }

    /// The blocks that hold the first `tokens` tokens.
    ///
    /// # Panics
    /// Where the table was not grown that far.
    pub fn covering(&self, tokens: usize) -> &[u32] {
        &self.blocks[..tokens.div_ceil(BLOCK_TOKENS)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn a_table_grows_by_whole_blocks_and_not_past_the_pool() {
        let mut pool = BlockPool::new(3);
        let mut table = BlockTable::default();
        assert!(table.grow(1, &mut pool));
        assert_eq!((pool.used(), table.covering(1)), (1, &[0][..]));
        assert!(table.grow(BLOCK_TOKENS, &mut pool));
        assert_eq!(pool.used(), 1);
        assert!(table.grow(BLOCK_TOKENS + 1, &mut pool));
        assert_eq!(table.covering(BLOCK_TOKENS + 1), &[0, 1]);
        assert!(!table.grow(3 * BLOCK_TOKENS + 1, &mut pool));
        assert_eq!(pool.used(), 2, "a refused growth takes nothing");
        table.release(&mut pool);
        assert_eq!((pool.used(), pool.free()), (0, 3));
    }

    #[test]
    fn a_ring_grows_no_further_than_the_window() {
        let ring = Ring { len: 3, blocks: 4 };
        let mut pool = BlockPool::with_ring(20, Some(ring));
        let (mut long, mut short) = (BlockTable::default(), BlockTable::default());
        assert!(long.grow(2 * BLOCK_TOKENS, &mut pool));
        assert_eq!(long.ring(), &[0, 1]);
        assert!(long.grow(9 * BLOCK_TOKENS, &mut pool));
        assert_eq!(long.ring(), &[0, 1, 2]);
        assert!(short.grow(BLOCK_TOKENS, &mut pool));
        assert!(
            !short.grow(BLOCK_TOKENS + 1, &mut pool),
            "no ring block is free"
        );
        assert_eq!((short.covering(1).len(), pool.used()), (1, 10));
        long.release(&mut pool);
        assert!(short.grow(BLOCK_TOKENS + 1, &mut pool));
    }

    proptest! {
        #[test]
        fn no_block_is_in_two_tables(steps in prop::collection::vec((0usize..4, 0usize..400, any::<bool>()), 1..60)) {
            let mut pool = BlockPool::new(20);
            let mut tables: Vec<BlockTable> = (0..4).map(|_| BlockTable::default()).collect();
            for (i, tokens, release) in steps {
                if release {
                    tables[i].release(&mut pool);
                } else {
                    let _ = tables[i].grow(tokens, &mut pool);
                }
                let held: Vec<u32> = tables.iter().flat_map(|t| t.blocks.iter().copied()).collect();
                let distinct: HashSet<u32> = held.iter().chain(&pool.free).copied().collect();
                prop_assert_eq!(held.len() + pool.free(), pool.total());
                prop_assert_eq!(distinct.len(), pool.total());
            }
        }
    }
}
