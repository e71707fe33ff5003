//! The KV cache as the scheduler sees it: a pool of fixed blocks, and a table of blocks for each sequence (paged
//! attention, arXiv:2309.06180). Sequences that begin the same share blocks, and the beginnings of
//! prompts stay where they are until their blocks are needed ([`super::prefix`]).

use super::prefix::{NodeId, Prefixes, step_end};
use crate::device::BLOCK_TOKENS;
use crate::model::Ring;

/// The blocks of one cache. Every block is free, or held by [`BlockTable`]s, or by the kept beginning of a
/// prompt, or by both.
#[derive(Debug)]
pub struct BlockPool {
    whole: Blocks,
    /// Of [`Blocks::kept`], those that no table holds: as good as free.
    idle: usize,
    ring: Blocks,
    /// How many ring blocks a sequence takes at most; 0 where there is no ring.
    ring_len: usize,
    prefixes: Prefixes,
}

/// The blocks of one part of the cache.
#[derive(Debug, Default)]
struct Blocks {
    /// A stack; the lowest numbers come out first, so that a lone sequence lies in order.
    free: Vec<u32>,
    /// How many hold each block.
    holders: Vec<u32>,
    /// Whether a kept beginning is one of them.
    kept: Vec<bool>,
}

impl Blocks {
    fn new(total: usize) -> Self {
        Self {
            free: (0..total as u32).rev().collect(),
            holders: vec![0; total],
            kept: vec![false; total],
        }
    }

    fn take(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.holders[block as usize] = 1;
        Some(block)
    }

    fn hold(&mut self, block: u32) {
        self.holders[block as usize] += 1;
    }

    fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(block);
        }
    }

    fn is_shared(&self, block: u32) -> bool {
        self.holders[block as usize] > 1
    }
}

impl BlockPool {
    /// A pool of `total` blocks, with a part for layers that see a window only where `ring` says so.
    pub fn new(total: usize, ring: Option<Ring>) -> Self {
        let (len, blocks) = ring.map_or((0, 0), |ring| (ring.len, ring.blocks));
        Self {
            whole: Blocks::new(total),
            idle: 0,
            ring: Blocks::new(blocks),
            ring_len: len,
            prefixes: Prefixes::default(),
        }
    }

    pub fn total(&self) -> usize {
        self.whole.holders.len()
    }

    /// Blocks that a sequence can have: those that hold nothing, and those that hold a beginning which
    /// nobody uses now.
    pub fn free(&self) -> usize {
        self.whole.free.len() + self.idle
    }

    /// Of [`BlockPool::free`], those that hold the beginning of a prompt.
    pub fn cached(&self) -> usize {
        self.idle
    }

    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    fn hold(&mut self, block: u32) {
        if self.whole.kept[block as usize] && !self.whole.is_shared(block) {
            self.idle -= 1;
        }
        self.whole.hold(block);
    }

    fn release(&mut self, block: u32) {
        self.whole.release(block);
        if self.whole.kept[block as usize] && !self.whole.is_shared(block) {
            self.idle += 1;
        }
    }

    /// Forgets beginnings that nobody uses until `wanted` blocks hold nothing; false where that cannot be.
    fn make_room(&mut self, wanted: usize) -> bool {
        if wanted > self.free() {
            return false;
        }
        while self.whole.free.len() < wanted {
            let whole = &self.whole;
            let unused = |blocks: &[u32]| blocks.iter().all(|&b| !whole.is_shared(b));
            let Some(node) = self.prefixes.remove_oldest(|n| unused(&n.blocks)) else {
                return false;
            };
            self.idle -= node.blocks.len();
            // The last one first: the lowest number is to come out first.
            for &block in node.blocks.iter().rev() {
                self.whole.kept[block as usize] = false;
                self.whole.release(block);
            }
            self.forget_ring(node.ring);
        }
        true
    }

    fn forget_ring(&mut self, ring: Option<Vec<u32>>) {
        for block in ring.into_iter().flatten().rev() {
            self.ring.release(block);
        }
    }
}

/// The blocks of one sequence, in token order.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    ring: Vec<u32>,
    /// How many of the first tokens lie in the node, or lay there when it was made.
    kept: usize,
    node: Option<NodeId>,
}

impl BlockTable {
    /// Takes over the longest beginning of `tokens` that is kept after `root`, so that at least one token is
    /// left to do; gives its length. The table must be empty. A prompt goes in steps of at most `step_rows`.
    pub fn reuse(
        &mut self,
        root: NodeId,
        tokens: &[u32],
        step_rows: usize,
        pool: &mut BlockPool,
    ) -> usize {
        let (mut node, mut at) = (root, 0);
        let mut path = Vec::new();
        // Nodes of the path up to the last one that a sequence can go on from, and where that one ends.
        let mut usable = (0, 0);
        loop {
            let end = step_end(at, step_rows);
            if end >= tokens.len() {
                break;
            }
            let Some(next) = pool.prefixes.find(node, &tokens[at..end]) else {
                break;
            };
            path.push(next);
            (node, at) = (next, end);
            let whole = pool.ring_len == 0;
            if whole || pool.prefixes.get(next).is_some_and(|n| n.ring.is_some()) {
                usable = (path.len(), end);
            }
        }
        path.truncate(usable.0);
        for &id in &path {
            let blocks = pool.prefixes.get(id).map(|n| n.blocks.clone());
            for block in blocks.into_iter().flatten() {
                pool.hold(block);
                self.blocks.push(block);
            }
        }
        let last = path.last().and_then(|&id| pool.prefixes.get(id));
        self.ring = last.and_then(|n| n.ring.clone()).unwrap_or_default();
        self.ring.iter().for_each(|&block| pool.ring.hold(block));
        self.node = Some(path.last().copied().unwrap_or(root));
        self.kept = usable.1;
        self.kept
    }

    /// Keeps what the table holds of `tokens`, all of which are in the cache and the last of which ended a
    /// step of a prompt, for those who begin the same. The steps before it must have been kept.
    pub fn keep(&mut self, tokens: &[u32], pool: &mut BlockPool) {
        let Some(parent) = self.node else { return };
        let (start, end) = (self.kept, tokens.len());
        let range = start / BLOCK_TOKENS..end / BLOCK_TOKENS;
        let snapshot = |pool: &mut BlockPool| {
            (pool.ring_len > 0).then(|| {
                self.ring.iter().for_each(|&block| pool.ring.hold(block));
                self.ring.clone()
            })
        };
        let id = match pool.prefixes.find(parent, &tokens[start..end]) {
            Some(id) => {
                // Somebody else was here: one copy of the same is enough.
                let lacks_ring = pool.prefixes.get(id).is_some_and(|n| n.ring.is_none());
                let ring = if lacks_ring { snapshot(pool) } else { None };
                let mut blocks = Vec::new();
                if let Some(node) = pool.prefixes.get_mut(id) {
                    node.ring = node.ring.take().or(ring);
                    blocks.clone_from(&node.blocks);
                }
                for (mine, theirs) in self.blocks[range].iter_mut().zip(blocks) {
                    pool.hold(theirs);
                    pool.release(std::mem::replace(mine, theirs));
                }
                id
            }
            None => {
                let blocks = self.blocks[range].to_vec();
                for &block in &blocks {
                    pool.whole.kept[block as usize] = true;
                    pool.whole.hold(block);
                }
                let ring = snapshot(pool);
                pool.prefixes
                    .insert(parent, &tokens[start..end], blocks, ring)
            }
        };
        self.node = Some(id);
        self.kept = end;
    }

    /// Takes blocks from `pool` until the table holds `tokens`. Takes none and returns false where the pool
    /// has too few.
    #[must_use]
    pub fn grow(&mut self, tokens: usize, pool: &mut BlockPool) -> bool {
        let (have, wanted) = (self.blocks.len(), tokens.div_ceil(BLOCK_TOKENS));
        let missing = wanted.saturating_sub(have);
        if missing > pool.free() || !self.make_room_in_ring(wanted, pool) {
            return false;
        }
        if !pool.make_room(missing) {
            return false;
        }
        for index in have..wanted {
            self.blocks.extend(pool.whole.take());
            if pool.ring_len > 0 {
                self.begin_ring_block(index, pool);
            }
        }
        true
    }

    /// Makes room for the ring blocks that blocks up to `wanted` need; windows that are kept for others give
    /// way.
    fn make_room_in_ring(&self, wanted: usize, pool: &mut BlockPool) -> bool {
        let have = self.blocks.len();
        // No more than a whole ring is new, however far the table grows.
        let new = have..wanted.min(have + pool.ring_len);
        loop {
            let needed = new
                .clone()
                .filter(|index| match self.ring.get(index % pool.ring_len) {
                    Some(&block) => pool.ring.is_shared(block),
                    None => true,
                })
                .count();
            if needed <= pool.ring.free.len() {
                return true;
            }
            match pool.prefixes.take_oldest_ring() {
                Some(ring) => pool.forget_ring(Some(ring)),
                None => return false,
            }
        }
    }

    /// Makes the ring's place for block `index` ours to write to. What lay there has left the window.
    fn begin_ring_block(&mut self, index: usize, pool: &mut BlockPool) {
        match self.ring.get_mut(index % pool.ring_len) {
            Some(block) if pool.ring.is_shared(*block) => {
                if let Some(new) = pool.ring.take() {
                    pool.ring.release(std::mem::replace(block, new));
                }
            }
            Some(_) => {}
            None => self.ring.extend(pool.ring.take()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Gives every block back.
    pub fn release(&mut self, pool: &mut BlockPool) {
        for block in std::mem::take(&mut self.blocks).into_iter().rev() {
            pool.release(block);
        }
        pool.forget_ring(Some(std::mem::take(&mut self.ring)));
        self.node = None;
        self.kept = 0;
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
    use super::super::prefix::root;
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn a_table_grows_by_whole_blocks_and_not_past_the_pool() {
        let mut pool = BlockPool::new(3, None);
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
        let mut pool = BlockPool::new(20, Some(ring));
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

    /// Steps of this many rows: they end at 32, 64, 128, 256, ...
    const ROWS: usize = 128;

    /// A sequence as the scheduler drives it, on a cache whose blocks hold what was written last.
    struct Driven {
        tokens: Vec<u32>,
        cached: usize,
        table: BlockTable,
    }

    /// What each block holds: all the tokens up to its end, which is what keys and values depend on.
    struct Contents {
        whole: Vec<Vec<u32>>,
        ring: Vec<Vec<u32>>,
    }

    impl Driven {
        /// One step; false where the pool has no room.
        fn step(&mut self, pool: &mut BlockPool, contents: &mut Contents) -> bool {
            if self.cached == 0 && self.table.is_empty() {
                self.cached = self.table.reuse(root(false), &self.tokens, ROWS, pool);
            }
            let end = step_end(self.cached, ROWS).min(self.tokens.len());
            if end == self.cached {
                return true;
            }
            if !self.table.grow(end, pool) {
                return false;
            }
            for index in self.cached / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
                let text = self.tokens[..((index + 1) * BLOCK_TOKENS).min(end)].to_vec();
                if pool.ring_len > 0 {
                    let block = self.table.ring()[index % pool.ring_len];
                    contents.ring[block as usize].clone_from(&text);
                }
                contents.whole[self.table.covering(end)[index] as usize] = text;
            }
            self.cached = end;
            if end == step_end(end - 1, ROWS) {
                self.table.keep(&self.tokens[..end], pool);
            }
            true
        }

        /// Whether the table leads to this sequence's own tokens, all of them and in the window.
        fn check(&self, pool: &BlockPool, contents: &Contents) {
            let blocks = self.cached.div_ceil(BLOCK_TOKENS);
            for index in 0..blocks {
                let text = &self.tokens[..((index + 1) * BLOCK_TOKENS).min(self.cached)];
                let block = self.table.covering(self.cached)[index];
                assert_eq!(contents.whole[block as usize], text);
                if index + pool.ring_len >= blocks {
                    let block = self.table.ring()[index % pool.ring_len];
                    assert_eq!(contents.ring[block as usize], text);
                }
            }
        }
    }

    /// Whether each block is held by as many as say so.
    fn check_holders<'a>(pool: &BlockPool, tables: impl Iterator<Item = &'a BlockTable> + Clone) {
        let nodes = || pool.prefixes.nodes();
        let mut holders = vec![0; pool.total()];
        let mut tabled = HashSet::new();
        let of_tables = tables.clone().flat_map(|t| &t.blocks);
        of_tables.clone().for_each(|&b| {
            tabled.insert(b);
        });
        let of_nodes: Vec<&u32> = nodes().flat_map(|n| &n.blocks).collect();
        of_tables
            .chain(of_nodes.iter().copied())
            .for_each(|&b| holders[b as usize] += 1);
        assert_eq!(holders, pool.whole.holders);
        let idle = of_nodes.iter().filter(|b| !tabled.contains(*b)).count();
        assert_eq!(idle, pool.idle);
        let unheld = holders.iter().filter(|&&n| n == 0).count();
        assert_eq!(unheld, pool.whole.free.len());
        let mut holders = vec![0; pool.ring.holders.len()];
        let of_nodes = nodes().flat_map(|n| n.ring.iter().flatten());
        tables
            .flat_map(|t| &t.ring)
            .chain(of_nodes)
            .for_each(|&b| holders[b as usize] += 1);
        assert_eq!(holders, pool.ring.holders);
    }

    proptest! {
        /// Whatever comes and goes, a sequence never reads what another one wrote for itself.
        #[test]
        fn shared_blocks_hold_what_each_sequence_wrote(
            ring in any::<bool>(),
            steps in prop::collection::vec((0usize..4, 0usize..6, 0usize..3, 1usize..400), 1..150),
        ) {
            let ring = ring.then_some(Ring { len: 7, blocks: 16 });
            let mut pool = BlockPool::new(24, ring);
            let mut contents = Contents { whole: vec![Vec::new(); 24], ring: vec![Vec::new(); 16] };
            let mut running: Vec<Option<Driven>> = (0..4).map(|_| None).collect();
            for (i, action, text, length) in steps {
                match &mut running[i] {
                    // Texts that begin the same and part later.
                    None => {
                        let tokens = (0..length).map(|t| if t < 100 { 0 } else { text as u32 }).collect();
                        running[i] = Some(Driven { tokens, cached: 0, table: BlockTable::default() });
                    }
                    Some(sequence) if action == 0 => {
                        sequence.table.release(&mut pool);
                        running[i] = None;
                    }
                    Some(sequence) => {
                        if !sequence.step(&mut pool, &mut contents) {
                            sequence.table.release(&mut pool);
                            sequence.cached = 0;
                        }
                    }
                }
                running.iter().flatten().for_each(|s| s.check(&pool, &contents));
                check_holders(&pool, running.iter().flatten().map(|s| &s.table));
            }
            for sequence in running.iter_mut().flatten() {
                sequence.table.release(&mut pool);
            }
            prop_assert_eq!((pool.used(), pool.free()), (0, 24));
            // All of it can be had, whatever was kept.
            let mut all = BlockTable::default();
            prop_assert!(all.grow(24 * BLOCK_TOKENS, &mut pool));
        }
    }

    #[test]
    fn a_kept_beginning_is_used_again_until_its_blocks_are_needed() {
        let mut pool = BlockPool::new(8, None);
        let text: Vec<u32> = (0..200).collect();
        let mut first = BlockTable::default();
        assert_eq!(first.reuse(root(false), &text, ROWS, &mut pool), 0);
        let mut at = 0;
        while step_end(at, ROWS) <= text.len() {
            at = step_end(at, ROWS);
            assert!(first.grow(at, &mut pool));
            first.keep(&text[..at], &mut pool);
        }
        assert_eq!((at, pool.used(), pool.cached()), (128, 4, 0));
        first.release(&mut pool);
        assert_eq!((pool.used(), pool.cached(), pool.free()), (0, 4, 8));
        let reused = |text: &[u32], long: bool, pool: &mut BlockPool| {
            let mut table = BlockTable::default();
            let n = table.reuse(root(long), text, ROWS, pool);
            table.release(pool);
            n
        };
        assert_eq!(reused(&text, false, &mut pool), 128);
        // A token must be left to do.
        assert_eq!(reused(&text[..129], false, &mut pool), 128);
        assert_eq!(reused(&text[..128], false, &mut pool), 64);
        assert_eq!(reused(&text, true, &mut pool), 0);
        let mut other = text.clone();
        other[40] = 7;
        assert_eq!(reused(&other, false, &mut pool), 32);
        // Six of eight blocks: the end of the beginning goes, the rest stays.
        let mut large = BlockTable::default();
        assert!(large.grow(6 * BLOCK_TOKENS, &mut pool));
        assert_eq!((pool.used(), pool.cached()), (6, 2));
        assert_eq!(reused(&text, false, &mut pool), 64);
        assert!(!large.grow(9 * BLOCK_TOKENS, &mut pool));
        assert!(large.grow(8 * BLOCK_TOKENS, &mut pool));
        assert_eq!(reused(&text, false, &mut pool), 0);
    }
}
