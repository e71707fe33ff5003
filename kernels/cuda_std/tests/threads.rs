//! Indices, barriers, shared memory, warps, atomics and the grid barrier in the emulator.

mod common;

use common::kernels::*;
use common::{run, try_run};
use cuda_std::emulator::{GuardedBuffer, Options, launch_cooperative, launch_with};
use cuda_std::params;
use cuda_std::prelude::*;
use cuda_std::settled::settled;

#[test]
fn barriers_order_shared_memory() {
    for threads in [1u32, 32, 33, 256, 1024] {
        let mut out = GuardedBuffer::<u32>::new(3 * threads as usize);
        run(
            &__KERNEL_rotate,
            3,
            threads,
            threads * 4,
            &params![out.as_mut_ptr()],
        );
        for (i, value) in out.as_slice().iter().enumerate() {
            assert_eq!(
                *value,
                (i as u32 % threads + 3) % threads * 10,
                "{threads} threads, place {i}"
            );
        }
    }
}

#[test]
fn static_and_dynamic_shared_memory_do_not_overlap() {
    let mut out = GuardedBuffer::<u32>::new(64);
    run(
        &__KERNEL_shared_kinds,
        1,
        64,
        256,
        &params![out.as_mut_ptr()],
    );
    for (i, value) in out.as_slice().iter().enumerate() {
        assert_eq!(*value, 3 * (63 - i as u32) + 6);
    }
}

#[test]
fn a_ring_between_two_warps() {
    for (rounds, bulk) in [(1u32, 0u32), (2, 1), (7, 0), (7, 1)] {
        let x: Vec<u32> = (0..128 * rounds).map(|i| i * i).collect();
        let mut out = GuardedBuffer::<u32>::new(32);
        run(
            &__KERNEL_ring,
            1,
            64,
            64 + 1024,
            &params![x.as_ptr(), out.as_mut_ptr(), rounds, bulk],
        );
        for (lane, sum) in out.as_slice().iter().enumerate() {
            let expected: u32 = x.iter().skip(lane).step_by(32).sum();
            assert_eq!(*sum, expected, "lane {lane}, {rounds} rounds, bulk {bulk}");
        }
    }
}

#[test]
fn shuffles_and_votes() {
    let mut out = GuardedBuffer::<u32>::new(2 * 64 * 8);
    run(&__KERNEL_exchanges, 2, 64, 0, &params![out.as_mut_ptr()]);
    for (thread, words) in out.as_slice().chunks(8).enumerate() {
        let (lane, warp) = (thread as u32 % 32, thread as u32 / 32 % 2);
        let of = |lane: u32| lane * lane + 100 * warp;
        let half = if lane < 16 { 0xffff } else { 0xffff_0000u32 };
        let expected = [
            of(lane ^ 5),
            of(if lane + 3 < 32 { lane + 3 } else { lane }),
            of(if lane >= 7 { lane - 7 } else { lane }),
            of(31 - lane),
            of(lane ^ 8),
            (0..32).filter(|l| l % 3 == 0).fold(0, |b, l| b | 1 << l),
            0x5555_5555 & half,
            2,
        ];
        assert_eq!(words, expected, "thread {thread}");
    }
}

#[test]
fn reductions_give_every_lane_the_same_bits() {
    let mut random = common::Random(1);
    let mut x: Vec<f32> = (0..96).map(|_| random.float(-3.0, 3.0)).collect();
    // Of the second warp all are negative, of the third some are none.
    x[32..64].iter_mut().for_each(|v| *v = -v.abs());
    (x[70], x[80], x[81], x[82]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN);
    let input = GuardedBuffer::from_slice(&x);
    let mut floats = GuardedBuffer::<f32>::new(3 * 96);
    let mut words = GuardedBuffer::<u32>::new(3 * 96);
    run(
        &__KERNEL_reductions,
        1,
        96,
        0,
        &params![input.as_ptr(), floats.as_mut_ptr(), words.as_mut_ptr()],
    );
    for warp in 0..3 {
        let part = &x[32 * warp..32 * (warp + 1)];
        // The tree, by hand.
        let mut tree = part.to_vec();
        for distance in [16, 8, 4, 2, 1] {
            tree = (0..32).map(|l| tree[l] + tree[l ^ distance]).collect();
        }
        let first = 32 * warp as u32;
        let sum: u32 = (first..first + 32).sum();
        for lane in 0..32 {
            let i = 32 * warp + lane;
            let max = part.iter().copied().fold(f32::MIN, f32::max);
            let min = part.iter().copied().fold(f32::MAX, f32::min);
            let [sum_f32, rest @ ..] = &floats.as_slice()[3 * i..3 * i + 3] else {
                panic!("three words");
            };
            assert!(*sum_f32 == tree[0] || sum_f32.is_nan() && tree[0].is_nan());
            assert_eq!(rest, [max, min], "warp {warp}");
            let top = (first as i32).wrapping_neg() as u32 ^ (first + 31);
            assert_eq!(
                words.as_slice()[3 * i..3 * i + 3],
                [sum, (sum as i32).wrapping_neg() as u32, top]
            );
        }
    }
}

#[test]
fn words_are_awaited_until_all_lanes_have_theirs() {
    let mut rows = GuardedBuffer::from_slice(&[0u128; 3 * 32]);
    let mut out = GuardedBuffer::<u32>::new(3 * 32);
    run(
        &__KERNEL_awaiting,
        1,
        64,
        0,
        &params![rows.as_mut_ptr().cast::<u32>(), out.as_mut_ptr()],
    );
    for (lane, sums) in out.as_slice().chunks(3).enumerate() {
        let row = |row: u32| 4 * (row * 1000 + lane as u32 * 10) + 6;
        let expected = [row(0), row(0) + row(1), row(0) + row(1) + row(2)];
        assert_eq!(sums, expected, "lane {lane}");
    }
}

#[test]
fn predicates_and_named_barriers() {
    let mut out = GuardedBuffer::<u32>::new(4 * 128);
    run(&__KERNEL_barriers, 1, 128, 512, &params![out.as_mut_ptr()]);
    for (i, words) in out.as_slice().chunks(4).enumerate() {
        let (half, i) = (i / 64, i % 64);
        let value = half * 64 + (i + 1 + half) % 64;
        assert_eq!(words, [43, 2, 1, value as u32]);
    }
}

#[test]
fn the_grid_waits_for_all_its_blocks() {
    for (blocks, threads, rounds) in [(1u32, 32u32, 3u32), (7, 64, 5), (40, 32, 2)] {
        // The counter is reused by the second launch, as it was left.
        let mut counter = GuardedBuffer::from_slice(&[0u32]);
        for _ in 0..2 {
            let mut slots = GuardedBuffer::<u32>::new(blocks as usize);
            let mut out = GuardedBuffer::<u32>::new((blocks * threads) as usize);
            // Safety: the parameters fit the kernel's.
            unsafe {
                launch_cooperative(
                    &__KERNEL_grid_rounds,
                    (blocks, 1, 1),
                    (threads, 1, 1),
                    0,
                    params![
                        counter.as_mut_ptr(),
                        slots.as_mut_ptr(),
                        out.as_mut_ptr(),
                        rounds
                    ]
                    .as_ptr(),
                )
            }
            .unwrap();
            for (i, value) in out.as_slice().iter().enumerate() {
                assert_eq!(*value, (i as u32 / threads + rounds) % blocks + rounds);
            }
        }
    }
}

#[test]
fn a_grid_barrier_needs_a_cooperative_launch() {
    let mut counter = GuardedBuffer::from_slice(&[0u32]);
    let mut slots = GuardedBuffer::<u32>::new(2);
    let mut out = GuardedBuffer::<u32>::new(64);
    let error = try_run(
        &__KERNEL_grid_rounds,
        (2, 1, 1),
        (32, 1, 1),
        0,
        &params![
            counter.as_mut_ptr(),
            slots.as_mut_ptr(),
            out.as_mut_ptr(),
            1u32
        ],
    )
    .unwrap_err();
    assert!(error.message.contains("cooperative"), "{error}");
}

#[test]
fn atomics_do_what_they_say() {
    let (blocks, threads) = (40u32, 128u32);
    let n = blocks * threads;
    let mut words = GuardedBuffer::from_slice(&[
        0u32,
        0,
        0,
        u32::MAX,
        0,
        0,
        0,
        0xff,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        9,
        9,
        9,
        9,
    ]);
    words.as_mut_slice()[4] = i32::MIN as u32;
    let mut wide = GuardedBuffer::from_slice(&[0u64, 0, u64::MAX, 0, 0, 0]);
    let mut float = GuardedBuffer::from_slice(&[0f32]);
    // Over several OS threads.
    run(
        &__KERNEL_atomics,
        blocks,
        threads,
        64,
        &params![words.as_mut_ptr(), wide.as_mut_ptr(), float.as_mut_ptr()],
    );
    let w = words.as_slice();
    let sum: u64 = (0..u64::from(n)).sum();
    assert_eq!(w[0], sum as u32);
    assert_eq!(w[1], n.wrapping_neg());
    assert_eq!((w[2], w[3]), (n - 1, 0));
    assert_eq!((w[4] as i32, w[5] as i32), (5, 1 - n as i32));
    assert_eq!((w[6], w[7]), (u32::MAX, 0));
    assert_eq!(
        (w[8], w[9], w[10], w[11], w[12], w[13]),
        (0, n, n, n, 2 * n, 77)
    );
    assert_eq!(
        w[16..20],
        [threads, 0u32.wrapping_sub(2 * threads), threads - 1, 0]
    );
    assert_eq!(
        wide.as_slice(),
        [
            sum << 32,
            u64::from(n - 1) << 33,
            9,
            3,
            u64::from(threads) << 40,
            u64::from(threads - 1) << 40
        ]
    );
    assert_eq!(float.as_slice(), [n as f32]);
}

#[test]
fn a_structure_of_four_kilobytes_is_a_parameter() {
    let n = 300u32;
    let input: Vec<u32> = (0..n).collect();
    let mut out = GuardedBuffer::<u32>::new(n as usize);
    let mut table = [0; 1000];
    (table[7], table[999]) = (100, 1000);
    let p = Large {
        input: input.as_ptr(),
        output: out.as_mut_ptr(),
        table,
        scale: 2.0,
        shift: 40,
    };
    run(
        &__KERNEL_large_parameter,
        3,
        128,
        0,
        &params![p, n, 1u64 << 40 | 5, 200u8],
    );
    for (i, value) in out.as_slice().iter().enumerate() {
        assert_eq!(*value, (i as u32 + 1140) * 2 + 205);
    }
}

#[test]
fn entries_made_by_a_macro() {
    let mut out = GuardedBuffer::<f32>::new(70);
    run(
        &__KERNEL_fill_f32,
        1,
        96,
        0,
        &params![out.as_mut_ptr(), 2.5f32, 70u32],
    );
    assert_eq!(out.as_slice(), [2.5; 70]);
    let mut out = GuardedBuffer::<u32>::new(70);
    run(
        &__KERNEL_fill_u32,
        1,
        96,
        0,
        &params![out.as_mut_ptr(), 7u32, 70u32],
    );
    assert_eq!(out.as_slice(), [7; 70]);
    let error = try_run(
        &__KERNEL_fill_u32,
        (1, 1, 1),
        (129, 1, 1),
        0,
        &params![out.as_mut_ptr(), 7u32, 70u32],
    );
    assert!(
        error
            .unwrap_err()
            .message
            .contains("launch_bounds allow 128")
    );
}

/// Notes in which order threads run: `out` = turn of each thread.
#[kernel]
unsafe fn turns(counter: *mut u32, out: *mut u32) {
    let turn = atomic::add_u32(counter, 1);
    *out.add(thread::index_1d() as usize) = turn;
}

#[test]
fn odd_blocks_run_backwards() {
    let mut counter = GuardedBuffer::from_slice(&[0u32]);
    let mut out = GuardedBuffer::<u32>::new(6);
    run(
        &__KERNEL_turns,
        2,
        3,
        0,
        &params![counter.as_mut_ptr(), out.as_mut_ptr()],
    );
    assert_eq!(out.as_slice(), [0, 1, 2, 5, 4, 3]);
    let (counter_at, out_at) = (counter.as_mut_ptr(), out.as_mut_ptr());
    let options = Options {
        threads: 1,
        alternate: false,
        ..Options::default()
    };
    // Safety: as `run`.
    unsafe {
        let params = [&raw const counter_at, &raw const out_at].map(|p| p.cast());
        launch_with(
            &__KERNEL_turns,
            (2, 1, 1),
            (3, 1, 1),
            0,
            params.as_ptr(),
            options,
        )
        .unwrap();
    }
    assert_eq!(out.as_slice(), [6, 7, 8, 9, 10, 11]);
}

/// Two numbers of those that a module is settled for.
#[kernel]
unsafe fn settled_numbers(out: *mut u32) {
    *out = settled::<0>();
    *out.add(1) = settled::<3>();
}

#[test]
fn a_launch_says_what_a_kernel_is_settled_for() {
    let mut out = GuardedBuffer::<u32>::new(2);
    let at = out.as_mut_ptr();
    let with = |options: Options| {
        // Safety: as `run`.
        unsafe {
            let params = [(&raw const at).cast()];
            let one = (1, 1, 1);
            launch_with(
                &__KERNEL_settled_numbers,
                one,
                one,
                0,
                params.as_ptr(),
                options,
            )
            .unwrap();
        }
        out.as_slice().to_vec()
    };
    assert_eq!(with(Options::default()), [u32::MAX; 2]);
    let options = Options {
        settled: [5, 6, 7, 8],
        ..Options::default()
    };
    assert_eq!(with(options), [5, 8]);
}

/// x, y, z of thread and block.
#[kernel]
unsafe fn indices(out: *mut u32) {
    let block = (thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y())
        * thread::grid_dim_x()
        + thread::block_idx_x();
    let index = (thread::thread_idx_z() * thread::block_dim_y() + thread::thread_idx_y())
        * thread::block_dim_x()
        + thread::thread_idx_x();
    let size = thread::block_dim_x() * thread::block_dim_y() * thread::block_dim_z();
    let place = block * size + index;
    *out.add(place as usize) = place;
}

#[test]
fn indices_have_three_dimensions() {
    let mut out = GuardedBuffer::<u32>::new(2 * 3 * 4 * 5 * 6 * 7);
    try_run(
        &__KERNEL_indices,
        (2, 3, 4),
        (5, 6, 7),
        0,
        &params![out.as_mut_ptr()],
    )
    .unwrap();
    assert!(
        out.as_slice()
            .iter()
            .enumerate()
            .all(|(i, x)| i as u32 == *x)
    );
}
