//! [`Driver`](super::Driver) over CUDA, through `cust`.

#[cfg(feature = "cuda")]
mod cubin;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod early;
#[cfg(feature = "cuda")]
mod readers;
#[cfg(feature = "cuda")]
mod real;
#[cfg(feature = "cuda")]
mod tensor_map;
#[cfg(feature = "cuda")]
pub use real::Cuda;

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(not(feature = "cuda"))]
pub use absent::Cuda;
