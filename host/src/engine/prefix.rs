//! Beginnings of prompts whose keys and values are kept in the cache, for prompts that begin the same.
//!
//! A prompt goes in steps that end at fixed positions ([`step_end`]), whoever sends it and whatever it goes on
//! with. So what a step leaves in the cache depends on the tokens up to its end and on nothing else, bit for
//! bit, and a prompt that finds its first steps done gets the very tokens that it would get alone. What
//! was generated is not kept: it went in steps of one row, which may be summed in another order.
//!
//! The steps form a tree; a node is known by its parent and its own tokens, all of them, so that no two texts
//! are ever taken for each other.

use crate::device::BLOCK_TOKENS;
use std::collections::HashMap;

/// Where the step ends that begins at `position`, if the prompt is that long: at a quarter, a half and the whole
/// of `step_rows`, then at its multiples. Short steps come first, so that short beginnings can be shared too;
/// long prompts still go in whole steps mostly.
///
/// Each end is a multiple of [`BLOCK_TOKENS`] where `step_rows` is one of four times that.
pub fn step_end(position: usize, step_rows: usize) -> usize {
    let part = |n: usize| (step_rows / n / BLOCK_TOKENS).max(1) * BLOCK_TOKENS;
    [part(4), part(2)]
        .into_iter()
        .find(|&end| position < end && end < step_rows)
        .unwrap_or((position / step_rows + 1) * step_rows)
}

/// A node, or the root it began from.
pub(super) type NodeId = u64;

/// The root of sequences that are expected to stay short, and of those that are not: a model may rotate their
/// keys by different angles ([`crate::device::Span::horizon`]).
pub(super) fn root(long: bool) -> NodeId {
    NodeId::from(long)
}

const ROOTS: NodeId = 2;

/// One step's part of the cache.
#[derive(Debug)]
pub(super) struct Node {
    parent: NodeId,
    tokens: Box<[u32]>,
    /// The blocks that hold `tokens`.
    pub blocks: Vec<u32>,
    /// What the window saw at the end of the step, where the cache has such a part and it is still there: only
    /// from such a node can a sequence go on.
    pub ring: Option<Vec<u32>>,
    children: usize,
    /// The later, the greater.
    used: u64,
}

/// The tree. It knows nothing of who else holds a block; [`super::kv::BlockPool`] does.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    nodes: HashMap<NodeId, Node>,
    index: HashMap<(NodeId, Box<[u32]>), NodeId>,
    made: u64,
    clock: u64,
}

impl Prefixes {
    /// The node of these tokens after `parent`; it counts as used now.
    pub fn find(&mut self, parent: NodeId, tokens: &[u32]) -> Option<NodeId> {
        let id = *self.index.get(&(parent, Box::from(tokens)))?;
        self.clock += 1;
        self.nodes.get_mut(&id)?.used = self.clock;
        Some(id)
    }

    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    pub fn get_mut(&mut self, id: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(&id)
    }

    /// Adds a node that [`Prefixes::find`] did not find. `parent` must be there.
    pub fn insert(
        &mut self,
        parent: NodeId,
        tokens: &[u32],
        blocks: Vec<u32>,
        ring: Option<Vec<u32>>,
    ) -> NodeId {
        let id = ROOTS + self.made;
        self.made += 1;
        self.clock += 1;
        let tokens: Box<[u32]> = tokens.into();
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children += 1;
        }
        self.index.insert((parent, tokens.clone()), id);
        let node = Node {
            parent,
            tokens,
            blocks,
            ring,
            children: 0,
            used: self.clock,
        };
        self.nodes.insert(id, node);
        id
    }

    /// Takes out the leaf that was used least lately, of those for which `may` holds.
    pub fn remove_oldest(&mut self, may: impl Fn(&Node) -> bool) -> Option<Node> {
        let leaves = self.nodes.iter().filter(|(_, n)| n.children == 0 && may(n));
        let (&id, _) = leaves.min_by_key(|(_, n)| n.used)?;
        let node = self.nodes.remove(&id)?;
        self.index.remove(&(node.parent, node.tokens.clone()));
        if let Some(parent) = self.nodes.get_mut(&node.parent) {
            parent.children -= 1;
        }
        Some(node)
    }

    /// Takes the window's blocks from the node that was used least lately, of those that have some.
    pub fn take_oldest_ring(&mut self) -> Option<Vec<u32>> {
        let with = self.nodes.values_mut().filter(|n| n.ring.is_some());
        with.min_by_key(|n| n.used)?.ring.take()
    }

    #[cfg(test)]
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_end_at_fixed_positions() {
        let ends = |rows: usize, until: usize| {
            let mut ends = vec![step_end(0, rows)];
            while ends[ends.len() - 1] < until {
                ends.push(step_end(ends[ends.len() - 1], rows));
            }
            ends
        };
        assert_eq!(ends(512, 1536), [128, 256, 512, 1024, 1536]);
        assert_eq!(ends(2048, 4096), [512, 1024, 2048, 4096]);
        assert_eq!(ends(32, 96), [32, 64, 96]);
        // From anywhere in between, the same ends.
        for position in 0..3000 {
            let end = step_end(position, 512);
            assert!(position < end && end - position <= 512);
            assert_eq!(end, step_end(end - 1, 512));
        }
    }

    #[test]
    fn the_least_used_leaf_goes_first() {
        let mut tree = Prefixes::default();
        let a = tree.insert(root(false), &[1], vec![0], None);
        let b = tree.insert(a, &[2], vec![1], None);
        tree.insert(root(true), &[1], vec![2], None);
        assert_eq!(tree.find(root(false), &[1]), Some(a));
        assert_eq!(tree.find(a, &[2]), Some(b));
        assert_eq!(tree.find(a, &[3]), None);
        let mut gone = || tree.remove_oldest(|_| true).map(|n| n.blocks);
        // `a` is used less lately than `b`, and a parent.
        assert_eq!(gone(), Some(vec![2]));
        assert_eq!(gone(), Some(vec![1]));
        assert_eq!(gone(), Some(vec![0]));
        assert_eq!(gone(), None);
        assert_eq!(tree.find(root(false), &[1]), None);
    }
}
