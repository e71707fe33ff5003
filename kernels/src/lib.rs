//! Every GPU kernel of Kigo.
//!
//! The same source is compiled twice: to PTX for the device, and for the host, where `cuda_std`
//! runs it in the emulator. Each kernel takes one `#[repr(C)]` struct of arguments, so that the host
//! that launches it is checked by the compiler.
//!
//! - [`types`]: how each weight type lies in device memory, and how it is read
//! - [`decode`]: a whole decode step of one row, in one launch
//! - [`one`]: matrix times one row: steps of one row that [`decode`] does not know
//! - [`skinny`]: matrix times several rows on tensor cores: steps of several sequences, short prompts
//! - [`dense`]: matrix times many rows, the weights unpacked beforehand, once for all: prefill; [`warpgroup`]: its
//!   products on Hopper; [`epilogue`]: how both write theirs
//! - [`exact`]: the plain f32 twin of all these
//! - [`attention`]: one query row at a time; [`flash`]: many on tensor cores
//! - [`experts`]: mixtures of experts
//! - [`rows`] (norms, rotation, casts)
//! - [`sample`]: the likeliest token; [`draw`]: one drawn after penalty, temperature and filters
//! - [`hand_off`]: no part of a model; the time in which blocks hand each other what they wrote, a floor of [`decode`]

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, f16))]
// Indexed loops with constant bounds unroll into registers; iterators over arrays may not. The branches of
// `unrolled!` that an index rules out are dead code, not errors.
#![allow(
    clippy::needless_range_loop,
    clippy::out_of_bounds_indexing,
    clippy::manual_is_multiple_of
)]
#![allow(unconditional_panic)]

// The module `sm_90a` is loaded beside another, and has the kernels of `warpgroup` alone.
#[cfg(not(cuda_sm_90a))]
pub mod attention;
#[cfg(not(cuda_sm_90a))]
pub mod decode;
#[cfg(not(cuda_sm_90a))]
pub mod dense;
#[cfg(not(cuda_sm_90a))]
pub mod draw;
pub mod epilogue;
#[cfg(not(cuda_sm_90a))]
pub mod exact;
#[cfg(not(cuda_sm_90a))]
pub mod experts;
#[cfg(not(cuda_sm_90a))]
pub mod flash;
#[cfg(not(cuda_sm_90a))]
pub mod hand_off;
#[cfg(not(cuda_sm_90a))]
pub mod heads;
#[cfg(not(cuda_sm_90a))]
pub mod one;
#[cfg(not(cuda_sm_90a))]
pub mod rows;
#[cfg(not(cuda_sm_90a))]
pub mod sample;
#[cfg(not(cuda_sm_90a))]
pub mod skinny;
#[cfg(not(cuda_sm_90a))]
pub mod types;
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90a))]
pub mod warpgroup;

#[cfg(not(cuda_sm_90a))]
pub(crate) use types::for_each_type;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    cuda_std::thread::trap()
}

/// Kernels that wait themselves for the launch before theirs, and for all that it waited for (`griddepcontrol`): from compute
/// capability 9.0 on they may begin while that runs. Small ones take most of their time to begin.
pub const WAITING: [&str; 21] = [
    "activate_rows",
    "argmax",
    "argmax_final",
    "attend_combine",
    "attend_f16",
    "attend_f32",
    "attend_heads_64",
    "attend_heads_128",
    "attend_q8",
    "cast_f16",
    "combine",
    "expert_linear",
    "finish_logits",
    "linear_one",
    "norm",
    "rope_cache",
    "route",
    "skinny",
    "skinny_join",
    "store_q8",
    "unpack_q8",
];

#[cfg(not(target_arch = "nvptx64"))]
cuda_std::kernels![
    attention::attend_combine,
    attention::attend_f16,
    attention::attend_f32,
    attention::attend_q8,
    heads::attend_heads_64,
    heads::attend_heads_128,
    decode::decode,
    decode::decode_bulk,
    dense::dense_128x128,
    dense::dense_64x128,
    dense::dense_64x64,
    dense::dense_gate_up_128x128,
    dense::dense_gate_up_64x128,
    dense::dequantise,
    draw::draw,
    exact::linear_exact,
    experts::combine,
    experts::expert_linear,
    experts::route,
    flash::flash_128,
    flash::flash_128_variant,
    flash::flash_64,
    flash::flash_64_variant,
    hand_off::hand_off,
    one::linear_one,
    rows::activate_rows,
    rows::cast_f16,
    rows::embed,
    rows::finish_logits,
    rows::norm,
    rows::rope_cache,
    rows::store_q8,
    rows::unpack_q8,
    sample::argmax,
    sample::argmax_final,
    skinny::skinny,
    skinny::skinny_join,
    types::repack_kernel,
    warpgroup::warpgroup_128x128,
    warpgroup::warpgroup_128x256,
    warpgroup::warpgroup_gate_up_128x128,
    warpgroup::warpgroup_gate_up_128x256,
];
