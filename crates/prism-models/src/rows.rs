//! Work that is done token by token, a few rows of a prompt at a time.
//!
//! On the CPU a prompt is cut into runs of rows which threads take in turn: Burn's element-wise
//! operations use one core each, and the activations of a few hundred rows stay in its cache. On
//! other devices a prompt stays whole.

use std::ops::Range;

use burn::tensor::Device;
use burn_prism::plan::{Kernel, kernel};
use rayon::prelude::*;

/// Rows that stay in a core's cache with their wide activations.
const ROWS: usize = 256;

/// Whether rows are cut into runs on `device`.
pub(crate) fn cut(device: &Device) -> bool {
    kernel(device) == Kernel::Flex
}

/// The runs of `n` rows.
pub(crate) fn runs(n: usize) -> Vec<Range<usize>> {
    (0..n).step_by(ROWS).map(|start| start..n.min(start + ROWS)).collect()
}

/// Does `work` for every run, in parallel where there are several; results in order.
pub(crate) fn map<T: Send, U: Send>(runs: Vec<T>, work: impl Fn(T) -> U + Sync + Send) -> Vec<U> {
    if runs.len() == 1 {
        return runs.into_iter().map(work).collect();
    }
    runs.into_par_iter().with_max_len(1).map(work).collect()
}
