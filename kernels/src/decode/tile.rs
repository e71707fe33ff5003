//! Quantised tiles as they lie in a turn of the [ring](super::ring).

use crate::types::{Planes, Quantised, Weights};
use core::marker::PhantomData;
use cuda_std::shared::SharedPtr;

/// A quantised tile of a row in shared memory.
pub(super) struct Tile<T> {
    start: u32,
    groups: u32,
    weights: PhantomData<T>,
}

impl<T: Weights> Tile<T> {
    /// The tile at address `start`, which has so many groups.
    #[inline(always)]
    pub fn new(start: u32, groups: u32) -> Self {
        Self {
            start,
            groups,
            weights: PhantomData,
        }
    }

    #[inline(always)]
    fn at<E>(&self, plane: usize, index: usize) -> SharedPtr<E> {
        let layout = T::LAYOUT;
        let offset = layout.plane_offset(plane, self.groups as usize);
        SharedPtr::from_addr(self.start + (offset + index * layout.planes[plane].bytes) as u32)
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
