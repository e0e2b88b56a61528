//! One file a backend.

#[cfg(feature = "autodiff")]
mod autodiff;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "ndarray")]
mod ndarray;
