//! What the hardware leaves undefined, the emulator reports.

mod common;

use common::try_run;
use cuda_std::emulator::{Error, GuardedBuffer, Kernel};
use cuda_std::params;
use cuda_std::prelude::*;

/// One way of going wrong each.
#[kernel]
unsafe fn misuse(which: u32, data: *mut u32) {
    let i = thread::thread_idx_x();
    let lane = thread::lane_id();
    match which {
        0 if i == 7 => {}
        0 | 1 if which == 0 || i > 40 => thread::sync_threads(),
        1 => {}
        2 if lane == 3 => {}
        2 => drop(warp::shuffle_xor(lane, 1)),
        3 if lane < 16 => drop(warp::ballot(true)),
        3 => drop(warp::shuffle_xor(lane, 1)),
        4 if lane == 0 => thread::sync_threads(),
        4 => warp::sync_warp(),
        5 => drop(shared::at::<u32>(0).add(i + 1).load()),
        6 => shared::at::<u32>(2).store(1),
        7 => assert!(i != 33, "thread 33 is not wanted"),
        8 => drop(warp::shuffle_idx_mask(0xff, lane, 9)),
        9 => drop(warp::shuffle_xor_mask(0x1, lane, 0)),
        10 => *shared::dynamic_shared_mem::<u32>().add(i as usize + 1) = 1,
        11 => *data.add(i as usize + 1) = 1,
        12 => memory::cp_async_16(shared::at::<u32>(16), data.add(1)),
        13 => drop(memory::ld_v4_u32(data.add(1))),
        14 if i < 32 => thread::bar_sync(1, 64),
        14 => thread::bar_sync(1, 32),
        15 => thread::bar_sync(3, 40),
        16 => drop(mma::ldmatrix_x1(shared::at::<u16>(0).add(lane * 16))),
        17 if i < 32 => thread::bar_sync(1, 64),
        17 if i < 34 => thread::sync_threads(),
        17 => {}
        _ => {
            let large = shared_static![[u32; 1024]; 60];
            large.cast::<u32>().store(1);
        }
    }
}

fn fails(which: u32) -> Error {
    let mut data = GuardedBuffer::<u32>::new(65);
    let shared = if which == 16 { 128 } else { 256 };
    let result = try_run(
        &__KERNEL_misuse,
        (1, 1, 1),
        (64, 1, 1),
        shared,
        &params![which, data.as_mut_ptr()],
    );
    let error = result.expect_err(&format!("misuse {which} went unseen"));
    assert_eq!(error.kernel, "misuse");
    error
}

#[test]
fn each_misuse_is_named() {
    for (which, thread, expected) in [
        (0, None, "exited"),
        (1, None, "exited"),
        (2, None, "exited"),
        (
            3,
            Some(16),
            "the warp has diverged: lane 16 is in shuffle_xor",
        ),
        (
            4,
            None,
            "deadlock: no thread can go on; thread (0, 0, 0) waits at barrier 0",
        ),
        (
            5,
            Some(63),
            "a load of 4 bytes at shared address 0x500 is out of range",
        ),
        (6, Some(0), "must be aligned to 4"),
        (7, Some(33), "panicked: thread 33 is not wanted"),
        (8, None, "reads from a lane outside of mask 0x000000ff"),
        (9, Some(1), "lane 1 is not in its own mask"),
        (
            10,
            None,
            "wrote behind dynamic shared memory of 256 bytes: 0 bytes past its end",
        ),
        (12, Some(0), "must be aligned"),
        (13, Some(0), "must be aligned"),
        (
            14,
            Some(32),
            "barrier 1: this thread arrives for Sync of 32 threads",
        ),
        (15, Some(0), "a multiple of 32"),
        (16, None, "ldmatrix of a row"),
        (17, None, "exited"),
        (18, Some(0), "bytes of static and dynamic shared memory"),
    ] {
        let error = fails(which);
        assert!(error.message.contains(expected), "misuse {which}: {error}");
        if let Some(thread) = thread {
            assert_eq!(
                error.thread,
                Some((thread, 0, 0)),
                "misuse {which}: {error}"
            );
        }
    }
}

#[test]
fn a_write_outside_a_buffer_is_found() {
    let mut data = GuardedBuffer::<u32>::new(64);
    try_run(
        &__KERNEL_misuse,
        (1, 1, 1),
        (64, 1, 1),
        256,
        &params![11u32, data.as_mut_ptr()],
    )
    .unwrap();
    assert_eq!(data.as_slice()[0], u32::MAX, "poison");
    assert_eq!(data.verify().unwrap_err().byte_offset, 256);
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(data)));
    assert!(
        dropped
            .unwrap_err()
            .downcast_ref::<String>()
            .unwrap()
            .contains("at byte 256")
    );
}

#[test]
fn a_launch_the_hardware_would_refuse() {
    let refused = |grid, block, shared, params: &[_]| {
        let kernel = Kernel {
            max_threads: 512,
            ..__KERNEL_misuse
        };
        try_run(&kernel, grid, block, shared, params)
            .unwrap_err()
            .message
    };
    let data: *mut u32 = std::ptr::null_mut();
    assert!(refused((0, 1, 1), (1, 1, 1), 0, &params![99u32, data]).contains("grid (0, 1, 1)"));
    assert!(refused((1, 70_000, 1), (1, 1, 1), 0, &params![99u32, data]).contains("65535"));
    assert!(refused((1, 1, 1), (33, 32, 1), 0, &params![99u32, data]).contains("1056 threads"));
    assert!(refused((1, 1, 1), (1, 1, 65), 0, &params![99u32, data]).contains("z at most 64"));
    assert!(
        refused((1, 1, 1), (513, 1, 1), 0, &params![99u32, data])
            .contains("launch_bounds allow 512")
    );
    assert!(refused((1, 1, 1), (1, 1, 1), 232_449, &params![99u32, data]).contains("232449 bytes"));
    assert!(
        refused(
            (1, 1, 1),
            (1, 1, 1),
            0,
            &[std::ptr::null(), std::ptr::null()]
        )
        .contains("parameter 0")
    );
}

/// Reads shared memory that nobody wrote.
#[kernel]
unsafe fn uninitialised(out: *mut f32) {
    *out = shared::at::<f32>(0).load();
    *out.add(1) = F16(shared::at::<u16>(4).load()).to_f32();
    *out.add(2) = *shared_array![f32; 1];
    shared::at::<f32>(0).store(1.0);
}

#[test]
fn shared_memory_begins_as_nan_in_every_block() {
    let mut out = GuardedBuffer::from_slice(&[0f32; 3]);
    try_run(
        &__KERNEL_uninitialised,
        (2, 1, 1),
        (1, 1, 1),
        64,
        &params![out.as_mut_ptr()],
    )
    .unwrap();
    assert!(
        out.as_slice().iter().all(|x| x.is_nan()),
        "{:?}",
        out.as_slice()
    );
}

#[test]
fn an_error_leaves_the_emulator_usable() {
    for _ in 0..3 {
        fails(2);
        shared_memory_begins_as_nan_in_every_block();
    }
}
