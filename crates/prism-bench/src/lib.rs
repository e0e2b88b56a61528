//! Timings of the Prism kernels on a device of any CubeCL runtime, and reports of them.
//!
//! [`attention`] times every step of a sparse call, dense attention, and others' kernels beside them;
//! [`matmul`] the products around it; `selectors`, with the feature `burn`, what choosing blocks takes by every
//! method. The former two take their times with the one [`clock`]. What was measured is a
//! [`report::Run`], which is written as JSON, tables and plots.

pub mod attention;
pub mod clock;
pub mod device;
pub mod inputs;
pub mod matmul;
mod million;
pub mod report;
#[cfg(feature = "burn")]
pub mod selectors;

pub use clock::{Budget, Clock, Time};
pub use device::Gpu;
pub use million::a_million;
pub use report::{Log, Record, Run};
