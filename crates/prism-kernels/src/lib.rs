//! Prism attention kernels in CubeCL: pool, select, schedule, attend.

pub mod attend;
pub mod band_mask;
pub mod calibrate;
pub mod capabilities;
mod fixed;
#[cfg(feature = "offline")]
pub mod offline;
pub mod operand;
pub mod pool;
pub mod schedule;
pub mod select;
mod span;
mod work;

pub use capabilities::Capabilities;
pub use operand::{Element, Operand};
pub use span::Spans;
