//! What `cargo bench --bench kernels` does, as a function: the program of a GPU machine does it too.

#[cfg(feature = "kernels")]
mod on_devices;

#[cfg(feature = "kernels")]
pub use on_devices::run;
