//! ndarray: tensor ops throughout.

#![allow(deprecated)] // Burn deprecates it, users still have it.

use burn::backend::NdArray;

use crate::ops::PrismBackend;

impl PrismBackend for NdArray {}
