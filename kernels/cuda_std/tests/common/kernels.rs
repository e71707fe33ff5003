//! Kernels that use each part of `cuda_std` once. The tests run them in the emulator;
//! `tests/device` compiles the same file for the device.

use cuda_std::prelude::*;
use cuda_std::tensor;

/// Three rotations of a block's values through shared memory: out[i] = 3 places further.
#[kernel]
pub unsafe fn rotate(out: *mut u32) {
    let (n, i) = (thread::block_dim_x(), thread::thread_idx_x());
    let slots = shared::at::<u32>(0);
    let mut value = i * 10;
    for _ in 0..3 {
        slots.add(i).store(value);
        thread::sync_threads();
        value = slots.add((i + 1) % n).load();
        thread::sync_threads();
    }
    *out.add(thread::index_1d() as usize) = value;
}

/// The same value through a generic pointer, two static arrays and dynamic shared memory.
#[kernel]
pub unsafe fn shared_kinds(out: *mut u32) {
    let i = thread::thread_idx_x();
    let a = shared_array![u32; 64];
    let b = shared_static![u8; 64];
    let dynamic = shared::dynamic_shared_mem::<u32>();
    *a.add(i as usize) = i + 1;
    b.add(i).store(i as u8 + 2);
    *dynamic.add(i as usize) = i + 3;
    thread::sync_threads();
    let j = 63 - i;
    let sum = *a.add(j as usize)
        + u32::from(b.add(j).load())
        + SharedPtr::from_generic(dynamic).add(j).load();
    *out.add(i as usize) = sum;
}

/// Six words a thread: each kind of shuffle, votes.
#[kernel]
pub unsafe fn exchanges(out: *mut u32) {
    let lane = thread::lane_id();
    let value = lane * lane + 100 * thread::warp_id();
    let half = if lane < 16 { 0x0000_ffff } else { 0xffff_0000 };
    let words = [
        warp::shuffle_xor(value, 5),
        warp::shuffle_down(value, 3),
        warp::shuffle_up(value, 7),
        warp::shuffle_idx(value, 31 - lane),
        warp::shuffle_xor_mask(half, value, 8),
        warp::ballot(lane.is_multiple_of(3)),
        warp::ballot_mask(half, lane.is_multiple_of(2)),
        u32::from(warp::any(lane == 40))
            + 2 * u32::from(warp::all(lane < 32))
            + 4 * u32::from(warp::all(lane < 31)),
    ];
    let place = out.add(thread::index_1d() as usize * 8);
    for (i, word) in words.into_iter().enumerate() {
        *place.add(i) = word;
    }
}

/// Sums and extremes over each warp.
#[kernel]
pub unsafe fn reductions(x: *const f32, floats: *mut f32, words: *mut u32) {
    let i = thread::index_1d() as usize;
    let value = memory::ldg_f32(x.add(i));
    *floats.add(3 * i) = warp::reduce_sum_f32(value);
    *floats.add(3 * i + 1) = warp::reduce_max_f32(value);
    *floats.add(3 * i + 2) = warp::reduce_min_f32(value);
    *words.add(3 * i) = warp::reduce_sum_u32(i as u32);
    *words.add(3 * i + 1) = warp::reduce_sum_i32(-(i as i32)) as u32;
    *words.add(3 * i + 2) =
        warp::reduce_max_i32(-(i as i32)) as u32 ^ warp::reduce_max_u32(i as u32);
}

/// The second warp writes words into `rows` (`[3][32][4]`), one row after the other, and the first waits for one row, for two, for all.
#[kernel]
pub unsafe fn awaiting(rows: *mut u32, out: *mut u32) {
    let (i, lane) = (thread::thread_idx_x(), thread::lane_id());
    let place = |row: u32| rows.add((row * 32 + lane) as usize * 4);
    // Five in the low bits says that a word is there.
    const MASK: u32 = 0xf;
    const THERE: u32 = 5;
    if i >= 32 {
        for row in 0..3 {
            for _ in 0..lane {
                thread::spin();
            }
            let word = |k: u32| ((row * 1000 + lane * 10 + k) << 4) | THERE;
            memory::st_relaxed_v4_u32(place(row), [0, 1, 2, 3].map(word));
        }
        return;
    }
    let [one] = memory::await_v4_u32([place(0)], MASK, THERE);
    let two = memory::await_v4_u32([place(0), place(1)], MASK, THERE);
    let three = memory::await_v4_u32([place(0), place(1), place(2)], MASK, THERE);
    let sum = |words: &[[u32; 4]]| words.iter().flatten().map(|w| w >> 4).sum::<u32>();
    let sums = [sum(&[one]), sum(&two), sum(&three)];
    for (k, sum) in sums.into_iter().enumerate() {
        *out.add(lane as usize * 3 + k) = sum;
    }
}

/// Block-wide predicates, and two halves of a block at barriers of their own.
#[kernel]
pub unsafe fn barriers(out: *mut u32) {
    let (i, n) = (thread::thread_idx_x(), thread::block_dim_x());
    let count = thread::sync_threads_count(i % 3 == 0);
    let or = thread::sync_threads_or(i == 1000) + 2 * thread::sync_threads_or(i == 5);
    let and = thread::sync_threads_and(i < n) + 2 * thread::sync_threads_and(i > 0);
    let half = n / 2;
    let mine = i / half;
    let slots = shared::at::<u32>(0);
    // Only the second half goes round twice.
    let mut value = i;
    for _ in 0..=mine {
        slots.add(i).store(value);
        thread::bar_sync(1 + mine, half);
        value = slots.add(mine * half + (i + 1) % half).load();
        thread::bar_sync(1 + mine, half);
    }
    let place = out.add(4 * i as usize);
    *place = count;
    *place.add(1) = or;
    *place.add(2) = and;
    *place.add(3) = value;
}

/// Row-major A (16 × 16), column-major B (8 columns of 16), row-major C and D (16 × 8).
#[kernel]
pub unsafe fn mma_16(a: *const u32, b: *const u32, c: *const f32, d: *mut f32, bf16: u32) {
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    // 8 words in a row or column of 16 elements.
    let fa = [
        *a.add(g * 8 + t),
        *a.add((g + 8) * 8 + t),
        *a.add(g * 8 + t + 4),
        *a.add((g + 8) * 8 + t + 4),
    ];
    let fb = [*b.add(g * 8 + t), *b.add(g * 8 + t + 4)];
    let places = [
        g * 8 + 2 * t,
        g * 8 + 2 * t + 1,
        (g + 8) * 8 + 2 * t,
        (g + 8) * 8 + 2 * t + 1,
    ];
    let fc = places.map(|p| *c.add(p));
    let fd = if bf16 == 0 {
        mma::m16n8k16_f16(fa, fb, fc)
    } else {
        mma::m16n8k16_bf16(fa, fb, fc)
    };
    for (place, value) in places.into_iter().zip(fd) {
        *d.add(place) = value;
    }
}

/// The same of unsigned bytes with signed ones: of all 32 bytes of a row, then of the first 16 and of the last 16.
#[kernel]
pub unsafe fn mma_u8_s8(a: *const u32, b: *const u32, d: *mut i32) {
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let fa = [
        *a.add(g * 8 + t),
        *a.add((g + 8) * 8 + t),
        *a.add(g * 8 + t + 4),
        *a.add((g + 8) * 8 + t + 4),
    ];
    let fb = [*b.add(g * 8 + t), *b.add(g * 8 + t + 4)];
    let all = [
        mma::m16n8k32_u8_s8(fa, fb, [1, 2, 3, 4]),
        mma::m16n8k16_u8_s8([fa[0], fa[1]], fb[0], [1, 2, 3, 4]),
        mma::m16n8k16_u8_s8([fa[2], fa[3]], fb[1], [1, 2, 3, 4]),
    ];
    let places = [
        g * 8 + 2 * t,
        g * 8 + 2 * t + 1,
        (g + 8) * 8 + 2 * t,
        (g + 8) * 8 + 2 * t + 1,
    ];
    for (i, fd) in all.into_iter().enumerate() {
        for (place, value) in places.into_iter().zip(fd) {
            *d.add(128 * i + place) = value;
        }
    }
}

/// A of 16 × 8, B of 8 × 8: halves, then TF32 behind it. B column-major.
#[kernel]
pub unsafe fn mma_k8(a: *const u32, b: *const u32, af: *const f32, bf: *const f32, d: *mut f32) {
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let places = [
        g * 8 + 2 * t,
        g * 8 + 2 * t + 1,
        (g + 8) * 8 + 2 * t,
        (g + 8) * 8 + 2 * t + 1,
    ];
    let halves = mma::m16n8k8_f16(
        [*a.add(g * 4 + t), *a.add((g + 8) * 4 + t)],
        *b.add(g * 4 + t),
        [0.0; 4],
    );
    let tf = |x: *const f32, row: usize, k: usize| half::to_tf32(*x.add(row * 8 + k));
    let fa = [
        tf(af, g, t),
        tf(af, g + 8, t),
        tf(af, g, t + 4),
        tf(af, g + 8, t + 4),
    ];
    let wide = mma::m16n8k8_tf32(fa, [tf(bf, g, t), tf(bf, g, t + 4)], [1.0; 4]);
    for i in 0..4 {
        *d.add(places[i]) = halves[i];
        *d.add(128 + places[i]) = wide[i];
    }
}

/// A of 16 × 32 and B of 32 × 8 (column-major), signed bytes.
#[kernel]
pub unsafe fn mma_s8(a: *const u32, b: *const u32, d: *mut i32) {
    let lane = thread::lane_id() as usize;
    let (g, t) = (lane / 4, lane % 4);
    let fa = [
        *a.add(g * 8 + t),
        *a.add((g + 8) * 8 + t),
        *a.add(g * 8 + t + 4),
        *a.add((g + 8) * 8 + t + 4),
    ];
    let fd = mma::m16n8k32_s8(fa, [*b.add(g * 8 + t), *b.add(g * 8 + t + 4)], [1, 2, 3, 4]);
    let places = [
        g * 8 + 2 * t,
        g * 8 + 2 * t + 1,
        (g + 8) * 8 + 2 * t,
        (g + 8) * 8 + 2 * t + 1,
    ];
    for (place, value) in places.into_iter().zip(fd) {
        *d.add(place) = value;
    }
}

/// The product of row-major A (16 × 16) and row-major B (16 × 8), as a real kernel does it: copied
/// asynchronously to shared memory, fragments by `ldmatrix`, B's transposed on the way.
#[kernel(launch_bounds(32))]
pub unsafe fn mma_ldmatrix(a: *const u16, b: *const u16, d: *mut f32) {
    let lane = thread::lane_id();
    let (sa, sb) = (shared::at::<u16>(0), shared::at::<u16>(512));
    // 32 pieces of 8 elements in A, 16 in B.
    memory::cp_async_16(sa.add(lane * 8), a.add(lane as usize * 8));
    memory::cp_async_commit();
    if lane < 16 {
        memory::cp_async_16(sb.add(lane * 8), b.add(lane as usize * 8));
    }
    memory::cp_async_commit();
    memory::cp_async_wait::<0>();
    warp::sync_warp();
    // Matrices: rows 0-7 and 8-15 of k 0-7, then of k 8-15.
    let fa = mma::ldmatrix_x4(sa.add(lane % 16 * 16 + lane / 16 * 8));
    let fb = mma::ldmatrix_x2_trans(sb.add(lane % 16 * 8));
    let fd = mma::m16n8k16_f16(fa, fb, [0.0; 4]);
    let (g, t) = (lane as usize / 4, lane as usize % 4);
    *d.add(g * 8 + 2 * t) = fd[0];
    *d.add(g * 8 + 2 * t + 1) = fd[1];
    *d.add((g + 8) * 8 + 2 * t) = fd[2];
    *d.add((g + 8) * 8 + 2 * t + 1) = fd[3];
}

/// The other widths of `ldmatrix`: 8 words a lane.
#[kernel]
pub unsafe fn matrix_loads(x: *const u16, out: *mut u32) {
    let lane = thread::lane_id();
    let slots = shared::at::<u16>(0);
    slots
        .cast::<u32>()
        .add(lane * 4)
        .store_v4(memory::ldg_v4_u32(x.add(lane as usize * 8)));
    warp::sync_warp();
    let row = slots.add(lane * 8);
    let [a] = mma::ldmatrix_x1(row);
    let [b] = mma::ldmatrix_x1_trans(row);
    let [c, d] = mma::ldmatrix_x2(row);
    let [e, f, g, h] = mma::ldmatrix_x4_trans(row);
    for (i, word) in [a, b, c, d, e, f, g, h].into_iter().enumerate() {
        *out.add(lane as usize * 8 + i) = word;
    }
}

/// Copies 4 words a thread; `wait` = 0 leaves the wait out.
#[kernel]
pub unsafe fn copies(x: *const u32, out: *mut u32, wait: u32, bytes: u32) {
    let i = thread::thread_idx_x();
    let slots = shared::at::<u32>(0);
    memory::cp_async_16(slots.add(4 * i), x.add(4 * i as usize));
    memory::cp_async_commit();
    memory::cp_async_16_zfill(
        slots.add(4 * (i + thread::block_dim_x())),
        x.add(4 * i as usize),
        bytes,
    );
    memory::cp_async_commit();
    if wait == 1 {
        memory::cp_async_wait::<1>();
    } else if wait == 2 {
        memory::cp_async_wait_all();
    }
    thread::sync_threads();
    let other = thread::block_dim_x() - 1 - i;
    memory::st_global_v4(out.add(8 * i as usize), slots.add(4 * other).load_v4());
    memory::st_global_v4(
        out.add(8 * i as usize + 4),
        slots.add(4 * (other + thread::block_dim_x())).load_v4(),
    );
}

/// The second warp brings `rounds` times 128 words through two places of a ring, the first sums them: with `bulk` by the
/// copy engine, where there is one, else 16 bytes a lane.
#[kernel]
pub unsafe fn ring(x: *const u32, out: *mut u32, rounds: u32, bulk: u32) {
    const PLACES: u32 = 2;
    let (warp, lane) = (thread::warp_id(), thread::lane_id());
    // A place's two barriers: it has come, it has been read.
    let barrier = |place: u32, i: u32| shared::at::<u64>(8 * (2 * place + i));
    let words = |place: u32| shared::at::<u32>(64 + 512 * place);
    if thread::thread_idx_x() < PLACES {
        let place = thread::thread_idx_x();
        mbarrier::init(barrier(place, 0), if bulk != 0 { 1 } else { 32 });
        mbarrier::init(barrier(place, 1), 32);
    }
    thread::sync_threads();
    let mut sum = 0;
    for round in 0..rounds {
        let (place, parity) = (round % PLACES, round / PLACES % 2);
        let (come, read) = (barrier(place, 0), barrier(place, 1));
        if warp == 0 {
            mbarrier::wait(come, parity);
            for i in 0..4 {
                sum += words(place).add(lane + 32 * i).load();
            }
            mbarrier::arrive(read);
        } else {
            mbarrier::wait(read, parity ^ 1);
            let from = x.add(128 * round as usize);
            if bulk == 0 {
                memory::cp_async_16(words(place).add(4 * lane), from.add(4 * lane as usize));
                mbarrier::arrive_after_copies(come);
            } else if lane == 0 {
                #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
                {
                    mbarrier::arrive_expecting(come, 512);
                    mbarrier::copy_bulk(words(place).cast(), from.cast(), 512, come);
                }
            }
        }
    }
    if warp == 0 {
        *out.add(lane as usize) = sum;
    }
}

/// Matrices that the copy engine brings to a warpgroup.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Boxes {
    pub a: tensor::TensorMap,
    pub b: tensor::TensorMap,
    /// The first row and column of both boxes.
    pub row: u32,
    pub col: u32,
    /// f32 `[64][128]`.
    pub out: *mut f32,
}

/// `out = A Bᵀ` of a box of 64 rows and one of 128, one block of 128 threads.
#[cfg(not(target_arch = "nvptx64"))]
#[kernel(launch_bounds(128))]
pub unsafe fn box_product(x: Boxes) {
    let t = thread::thread_idx_x();
    let arguments = cuda_std::argument!(box_product, x);
    let tile = |n: u32| {
        SharedPtr::<u8>::from_addr(shared::at::<u8>(0).addr().next_multiple_of(1024) + 1024 + n)
    };
    let come = shared::at::<u64>(0);
    let (a, b) = (tile(0), tile(64 * 128));
    if t == 0 {
        mbarrier::init(come, 1);
        mbarrier::show_to_copies();
    }
    thread::sync_threads();
    if t < 32 && warp::elect() {
        mbarrier::arrive_expecting(come, 192 * 128);
        tensor::copy_box(a, &raw const (*arguments).a, x.row, x.col, come);
        tensor::copy_box(b, &raw const (*arguments).b, x.row, x.col, come);
    }
    mbarrier::wait(come, 0);
    let d = cuda_std::wgmma::m64n128k64_f16(a.cast(), b.cast(), [[0.0; 4]; 16]);
    let (row, col) = (t / 32 * 16 + t % 32 / 4, t % 4 * 2);
    for (j, d) in d.into_iter().enumerate() {
        for (i, d) in d.into_iter().enumerate() {
            let at = (row + i as u32 / 2 * 8) * 128 + 8 * j as u32 + col + i as u32 % 2;
            *x.out.add(at as usize) = d;
        }
    }
}

/// Each block writes, all wait, each block reads its neighbour; `rounds` times.
#[kernel]
pub unsafe fn grid_rounds(counter: *mut u32, slots: *mut u32, out: *mut u32, rounds: u32) {
    let (b, n) = (thread::block_idx_x(), thread::grid_dim_x());
    let mut value = b;
    for _ in 0..rounds {
        if thread::thread_idx_x() == 0 {
            *slots.add(b as usize) = value;
        }
        grid::sync(counter);
        value = memory::ld_cg_u32(slots.add(((b + 1) % n) as usize)) + 1;
        grid::sync(counter);
    }
    *out.add(thread::index_1d() as usize) = value;
}

/// A parameter of nearly 4 KB.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Large {
    pub input: *const u32,
    pub output: *mut u32,
    pub table: [u32; 1000],
    pub scale: f32,
    pub shift: u16,
}

#[kernel]
pub unsafe fn large_parameter(p: Large, n: u32, extra: u64, byte: u8) {
    let i = thread::index_1d();
    if i < n {
        let value = *p.input.add(i as usize) + p.table[7] + p.table[999] + u32::from(p.shift);
        *p.output.add(i as usize) =
            (value as f32 * p.scale) as u32 + extra as u32 + u32::from(byte);
    }
}

#[kernel]
pub unsafe fn atomics(words: *mut u32, wide: *mut u64, float: *mut f32) {
    let i = thread::index_1d();
    atomic::add_u32(words, i);
    atomic::add_i32(words.add(1).cast(), -1);
    atomic::max_u32(words.add(2), i);
    atomic::min_u32(words.add(3), i);
    atomic::max_i32(words.add(4).cast(), 5 - i as i32);
    atomic::min_i32(words.add(5).cast(), -(i as i32));
    atomic::or_u32(words.add(6), 1 << (i % 32));
    atomic::and_u32(words.add(7), !(1 << (i % 8)));
    while atomic::cas_u32(words.add(8), 0, 1) != 0 {
        thread::nanosleep(20);
    }
    *words.add(9) += 1;
    memory::threadfence();
    atomic::exch_u32(words.add(8), 0);
    if atomic::add_acq_rel_u32(words.add(10), 1) == thread::grid_dim_x() * thread::block_dim_x() - 1
    {
        *words.add(11) = atomic::load_acquire_u32(words.add(10));
    }
    atomic::red_release_add_u32(words.add(12), 2);
    atomic::store_release_u32(words.add(13), 77);
    atomic::add_u64(wide, u64::from(i) << 32);
    atomic::max_u64(wide.add(1), u64::from(i) << 33);
    atomic::min_u64(wide.add(2), u64::from(i) + 9);
    atomic::exch_u64(wide.add(3), 3);
    atomic::add_f32(float, 1.0);
    let sums = shared::at::<u32>(0);
    if thread::thread_idx_x() == 0 {
        sums.store_v4([0, 0, 0, u32::MAX]);
        sums.add(4).cast::<u64>().store(0);
        sums.add(6).cast::<u64>().store(0);
    }
    thread::sync_threads();
    atomic::shared_add_u32(sums, 1);
    atomic::shared_add_i32(sums.add(1).cast(), -2);
    atomic::shared_max_u32(sums.add(2), i);
    atomic::shared_min_u32(sums.add(3), i);
    atomic::shared_add_u64(sums.add(4).cast(), 1 << 40);
    atomic::shared_max_u64(sums.add(6).cast(), u64::from(i) << 40);
    thread::sync_threads();
    if thread::thread_idx_x() == 0 && thread::block_idx_x() == 0 {
        memory::st_global_v4(words.add(16), sums.load_v4());
        *wide.add(4) = sums.add(4).cast::<u64>().load();
        *wide.add(5) = sums.add(6).cast::<u64>().load();
    }
}

/// Every load and store, of each type; 32 words of `x`, what was loaded goes to `out`.
#[kernel]
pub unsafe fn loads(x: *const u32, out: *mut u32) {
    let mut n = 0;
    let mut put = |word: u32| {
        *out.add(n) = word;
        n += 1;
    };
    for v in [
        memory::ld_v4_u32(x),
        memory::ldg_v4_u32(x.add(4)),
        memory::ldg_v4_u32_stream(x.add(8)),
        memory::ldg_v4_u32_stream_l2(x.add(12)),
        memory::ldg_v4_u32_cs(x.add(16)),
        memory::ld_cg_v4_u32(x.add(20)),
    ] {
        v.into_iter().for_each(&mut put);
    }
    for v in [
        memory::ld_v2_u32(x.add(24)),
        memory::ldg_v2_u32(x.add(26)),
        memory::ldg_v2_u32_stream(x.add(28)),
    ] {
        v.into_iter().for_each(&mut put);
    }
    put(memory::ldg_u32(x.add(30)));
    put(memory::ldg_u32_stream(x.add(31)));
    put(u32::from(memory::ldg_u8(x.cast::<u8>().add(1))));
    put(u32::from(memory::ldg_u16(x.cast::<u16>().add(3))));
    put(u32::from(memory::ldg_u8_stream(x.cast::<u8>().add(2))));
    put(u32::from(memory::ldg_u16_stream(x.cast::<u16>().add(5))));
    put(memory::ldg_i32(x.add(3).cast()) as u32);
    put(memory::ldg_f32(x.add(3).cast()).to_bits());
    put((memory::ldg_u64(x.add(2).cast()) >> 32) as u32);
    put(memory::ld_cg_u32(x.add(5)));
    put(memory::ld_cg_f32(x.add(6).cast()).to_bits());
    memory::prefetch_l2(x);
    memory::st_global_v2(out.add(48), [1, 2]);
    memory::st_global_v4_cs(out.add(52), [3, 4, 5, 6]);
    // Shared memory, in each width.
    let s = shared::at::<u32>(0);
    s.store_v4([0x0403_0201, 0x0807_0605, 0x0c0b_0a09, 0x100f_0e0d]);
    s.add(4).store_v2([17, 18]);
    s.add(6).cast::<i32>().store(-1);
    s.add(7).cast::<f32>().store(1.5);
    s.add(8).cast::<u16>().store(0xabcd);
    s.add(9).cast::<i8>().store(-2);
    s.add(10).cast::<F16>().store(F16(0x3c00));
    put(u32::from(s.cast::<u8>().add(6).load()));
    put(s.cast::<i8>().add(7).load() as u32);
    put(u32::from(s.cast::<u16>().add(3).load()));
    put(s.cast::<i16>().add(2).load() as u32);
    put(s.add(9).cast::<i8>().load() as u32);
    let [a, b] = s.add(4).load_v2();
    put((a + b).wrapping_add(s.add(6).load()) + s.cast::<f32>().add(7).load() as u32);
}

/// One elementary function over `n` values.
#[kernel]
pub unsafe fn functions(x: *const f32, y: *const f32, out: *mut f32, n: u32, which: u32) {
    let i = thread::index_1d();
    if i < n {
        let (x, y) = (*x.add(i as usize), *y.add(i as usize));
        *out.add(i as usize) = match which {
            0 => float::exp(x),
            1 => float::ln(x),
            2 => float::sin(x),
            3 => float::cos(x),
            4 => float::tanh(x),
            5 => float::sqrt(x),
            6 => float::rsqrt(x),
            7 => float::powf(x, y),
            8 => float::sin_cos(x).0 + float::sin_cos(x).1,
            9 => float::fma(x, y, 1.0),
            10 => {
                float::exp2_approx(x)
                    + float::log2_approx(x)
                    + float::rcp_approx(x)
                    + float::rsqrt_approx(x)
            }
            11 => {
                float::sin_approx(x)
                    + float::cos_approx(x)
                    + float::tanh_approx(x)
                    + float::exp_approx(x)
            }
            12 => float::max(x, y) + float::min(x, y) + float::abs(x) + float::floor(y),
            _ => float::round_to_i32(x) as f32,
        };
    }
}

/// Halves and integers: 16 words a thread from two.
#[kernel]
pub unsafe fn words(a: *const u32, b: *const u32, out: *mut u32, n: u32) {
    let i = thread::index_1d() as usize;
    if i >= n as usize {
        return;
    }
    let (a, b) = (*a.add(i), *b.add(i));
    let (x, y) = (Half2(a), Half2(b));
    let f = f32::from_bits(a);
    let results = [
        int::dp4a(a, b, 7),
        int::dp4a_us(a, b, 7),
        int::dp4a_uu(a, b, 7),
        int::lop3::<0xe8>(a, b, 0x1234_5678) as i32,
        int::prmt(a, b, 0xfa61) as i32,
        int::sub_bytes(a, b) as i32,
        half::hfma2(x, y, x).0 as i32,
        half::hadd2(x, y).0 as i32,
        half::hsub2(x, y).0 as i32,
        half::hmul2(x, y).0 as i32,
        half::hmax2(x, y).0 as i32,
        half::pack_f16x2(f, f32::from_bits(b)) as i32,
        half::pack_bf16x2(f, f32::from_bits(b)) as i32,
        i32::from(F16::from_f32(f).0) | i32::from(BF16::from_f32(f).0) << 16,
        F16(a as u16).to_f32().to_bits() as i32,
        int::funnel_shift_right(a, b, b) as i32,
    ];
    for (j, word) in results.into_iter().enumerate() {
        *out.add(16 * i + j) = word as u32;
    }
}

/// A generic device function, and two entries made of it.
unsafe fn fill<T: Copy>(out: *mut T, value: T, n: u32) {
    let i = thread::index_1d();
    if i < n {
        unsafe { *out.add(i as usize) = value };
    }
}

macro_rules! entry {
    ($name:ident, $t:ty) => {
        #[kernel(launch_bounds(128))]
        pub unsafe fn $name(out: *mut $t, value: $t, n: u32) {
            let scratch = shared_static![$t; 16];
            scratch.store(value);
            fill::<$t>(out, scratch.load(), n);
        }
    };
}

entry!(fill_u32, u32);
entry!(fill_f32, f32);

/// Timers and programmatic launch: nothing but that they are there.
#[kernel]
pub unsafe fn timers(out: *mut u64) {
    thread::griddepcontrol_wait();
    let start = thread::clock64();
    thread::nanosleep(10);
    memory::threadfence_block();
    memory::threadfence_system();
    *out = thread::clock64() - start;
    *out.add(1) = thread::globaltimer();
    *out.add(2) = u64::from(shared::dynamic_smem_size());
    thread::griddepcontrol_launch_dependents();
}
