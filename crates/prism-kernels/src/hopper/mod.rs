//! Instructions of Hopper (sm_90a) as inline PTX, under names: what attention and the matrix product
//! are written in.
//!
//! Only CubeCL's C++ compiler takes PTX (feature `cuda-cpp`).

pub(crate) mod bulk;
pub(crate) mod cluster;
pub(crate) mod ptx;
pub(crate) mod wgmma;

/// Whether waits for copies trap after seconds instead of hanging: with the environment variable
/// `PRISM_BOUNDED_WAITS` set.
pub(crate) fn bounded_waits() -> bool {
    std::env::var_os("PRISM_BOUNDED_WAITS").is_some()
}
