//! The tensor-op fallback against the f64 oracle, on every CPU backend.

#![cfg(all(feature = "flex", feature = "ndarray", feature = "autodiff"))]
#![allow(deprecated)] // NdArray

mod attend;
mod pool;
mod second_order;
mod select;
mod support;

use burn::backend::{Autodiff, Flex, NdArray};

use attend::*;
use pool::*;
use second_order::*;
use select::*;

macro_rules! on {
    ($($name:ident: $Backend:ty => [$($test:ident),* $(,)?];)*) => {$(
        mod $name {
            use super::*;

            $(#[test]
            fn $test() {
                super::$test::<$Backend>();
            })*
        }
    )*};
}

on! {
    flex: Flex => [
        pools, pools_moments, selects_by_second_order, attends, attends_in_tiles, selects, selects_in_tiles, selects_from_odd_numbers,
        bad_keys_stay_where_they_are_read, rows_without_keys_are_zero, takes_half_precision,
    ];
    ndarray: NdArray => [
        pools, pools_moments, selects_by_second_order, attends, attends_in_tiles, selects, selects_in_tiles, selects_from_odd_numbers,
        bad_keys_stay_where_they_are_read, rows_without_keys_are_zero,
    ];
    autodiff: Autodiff<Flex> => [
        pools, pools_moments, selects_by_second_order, attends, selects, gradients_are_right];
    autodiff_ndarray: Autodiff<NdArray> => [gradients_are_right];
}
