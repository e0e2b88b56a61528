//! One file a backend.

#[cfg(feature = "autodiff")]
mod autodiff;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
pub(crate) mod cube;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
pub(crate) mod cube_linear;
#[cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu"))]
pub(crate) mod cube_select;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "fusion")]
pub(crate) mod fusion;
#[cfg(feature = "ndarray")]
mod ndarray;
