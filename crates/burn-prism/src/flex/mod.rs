//! Native CPU kernels: plain Rust over strided slices, nothing of Burn.
//!
//! [`pool`] reads Q or K once; [`attend`] walks the selected [`blocks`] of each query tile with
//! an online `softmax` between two register-tiled block products (`matmul`).

pub mod attend;
pub mod blocks;
mod matmul;
pub mod pool;
mod softmax;
mod tile;
pub mod view;
