//! Prism attention kernels in CubeCL: pool, calibrate, select, schedule, attend.
//!
//! The order of a sparse call: [`pool`] means of Q and K blocks, [`calibrate`] the factors on their
//! scores, [`select`] the key blocks that each row reads, [`schedule`] the rows, [`attend`]. Each
//! rule stands in [`prism_core`]; here is the device code and its launches, on any CubeCL runtime.
//! [`matmul`] computes the projections around them.
//! Which kernel runs is chosen on the host from [`Capabilities`].

// Device code is CubeCL's language: conditions on compile-time values stand by themselves, loops
// index by unrolled variables, and only its own operators are there.
#![allow(
    clippy::collapsible_if,
    clippy::identity_op,
    clippy::manual_checked_ops,
    clippy::manual_is_multiple_of,
    clippy::needless_range_loop,
    clippy::too_many_arguments
)]

pub mod attend;
pub mod band_mask;
pub mod calibrate;
pub mod capabilities;
mod fixed;
#[cfg(any(feature = "cuda-cpp", feature = "offline"))]
mod hopper;
pub mod matmul;
pub mod moments;
#[cfg(feature = "offline")]
pub mod offline;
pub mod operand;
pub mod pool;
pub mod rotate;
pub mod schedule;
pub mod select;
mod span;
mod special;
mod work;

pub use capabilities::Capabilities;
pub use matmul::Matrix;
pub use operand::{Element, Operand};
pub use span::Spans;
