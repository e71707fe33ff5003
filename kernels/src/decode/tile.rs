//! Quantised tiles as they lie in a turn of the [ring](super::ring).

use crate::types::{Planes, Quantised, Weights};
use core::marker::PhantomData;
use cuda_std::shared::SharedPtr;

/// A part of a quantised tile of a row in shared memory: its groups from one on, all of one block of the file.
pub(super) struct Tile<T> {
    start: u32,
    /// Of all of the tile.
    groups: u32,
    first: u32,
    weights: PhantomData<T>,
}

impl<T: Weights> Tile<T> {
    /// Of the tile at address `start`, which has so many groups, those from `first` on.
    #[inline(always)]
    pub fn new(start: u32, groups: u32, first: u32) -> Self {
        Self {
            start,
            groups,
            first,
            weights: PhantomData,
        }
    }

    #[inline(always)]
    fn at<E>(&self, plane: usize, index: usize) -> SharedPtr<E> {
        let layout = T::LAYOUT;
        let offset = layout.plane_offset(plane, self.groups as usize);
        let before = layout.elements(plane, self.first as usize) + index;
        SharedPtr::from_addr(self.start + (offset + before * layout.planes[plane].bytes) as u32)
    }
}

impl<T: Quantised> Planes for Tile<T> {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4] {
        unsafe { self.at::<u32>(plane, index).load_v4() }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2] {
        unsafe { self.at::<u32>(plane, index).load_v2() }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, index: usize) -> u32 {
        unsafe { self.at::<u32>(plane, index).load() }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        unsafe { self.at::<u16>(plane, index).load() }
    }

    #[inline(always)]
    unsafe fn single(&self, plane: usize, index: usize) -> u8 {
        unsafe { self.at::<u8>(plane, index).load() }
    }
}

/// A tile whose levels are read as two words of a group, `word` and `word + 4`: see [`Planes::level_words4`].
pub(super) struct TwoWords<T> {
    pub tile: Tile<T>,
    pub word: u32,
}

impl<T: Quantised> TwoWords<T> {
    /// Word `word` of an element.
    #[inline(always)]
    unsafe fn one(&self, plane: usize, index: usize, word: u32) -> u32 {
        unsafe { self.tile.at::<u32>(plane, index).add(word).load() }
    }
}

impl<T: Quantised> Planes for TwoWords<T> {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4] {
        unsafe { self.tile.words4(plane, index) }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2] {
        unsafe { self.tile.words2(plane, index) }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, index: usize) -> u32 {
        unsafe { self.tile.word(plane, index) }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        unsafe { self.tile.half_word(plane, index) }
    }

    #[inline(always)]
    unsafe fn single(&self, plane: usize, index: usize) -> u8 {
        unsafe { self.tile.single(plane, index) }
    }

    #[inline(always)]
    unsafe fn level_words4(&self, plane: usize, index: usize) -> [u32; 4] {
        [unsafe { self.one(plane, index, self.word) }; 4]
    }

    #[inline(always)]
    unsafe fn level_runs4(&self, plane: usize, index: usize) -> [u32; 4] {
        let (word, shift) = (self.word / 2, self.word % 2 * 16);
        let [near, far] = [0, 2].map(|w| unsafe { self.one(plane, index, word + w) } >> shift);
        [near, near, far, far]
    }

    #[inline(always)]
    unsafe fn level_words2(&self, plane: usize, index: usize) -> [u32; 2] {
        // Two groups' words at a time: of the same ones for either the compiler makes one.
        let two: [u32; 4] = unsafe { self.tile.at(plane, index / 2 * 2).load_v4() };
        let from = index % 2 * 2;
        [two[from], two[from + 1]].map(|v| v >> (2 * self.word))
    }

    #[inline(always)]
    unsafe fn level_word(&self, plane: usize, index: usize) -> u32 {
        // Four groups' likewise.
        let four: [u32; 4] = unsafe { self.tile.at(plane, index / 4 * 4).load_v4() };
        four[index % 4] >> self.word
    }
}
