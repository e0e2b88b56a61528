//! What can be refused, one variant a cause; each message names the limit and the value got.

use thiserror::Error;

use crate::scores::{MAX_SUB_BLOCK, MIN_SUB_BLOCK};

/// Result of a fallible call of this library.
pub type Result<T, E = PrismError> = std::result::Result<T, E>;

/// Why a call was refused. Nothing has been computed or changed when one of these is returned.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum PrismError {
    /// A dimension that must be positive is zero.
    #[error("{name} must be at least 1, got 0")]
    ZeroDim {
        /// Which dimension.
        name: &'static str,
    },
    /// Two tensors disagree on a dimension.
    #[error("{name} of {left} is {left_len}, but {right} has {right_len}")]
    DimMismatch {
        /// Which dimension.
        name: &'static str,
        /// First tensor.
        left: &'static str,
        /// Its length.
        left_len: usize,
        /// Second tensor.
        right: &'static str,
        /// Its length.
        right_len: usize,
    },
    /// A tensor of another shape than goes with the others.
    #[error("{what} must be {expected:?}, got {got:?}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// The shape that goes with the others.
        expected: Vec<usize>,
        /// Its shape.
        got: Vec<usize>,
    },
    /// A dimension that must be a multiple of something isn't.
    #[error("{name} must be a multiple of {multiple}, got {got}")]
    Multiple {
        /// Which dimension.
        name: &'static str,
        /// What it must be a multiple of.
        multiple: usize,
        /// Its length.
        got: usize,
    },
    /// Query heads are not a multiple of key/value heads.
    #[error("query heads must be a multiple of kv heads, got {q_heads} query and {kv_heads} kv")]
    HeadGroups {
        /// Query heads.
        q_heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// A size is beyond what index arithmetic can hold.
    #[error("{what} does not fit: the limit is {limit}")]
    TooLarge {
        /// What overflowed.
        what: &'static str,
        /// The largest value that works.
        limit: u64,
    },
    /// Per-sequence lengths don't fit the tensors.
    #[error("sequence lengths: {reason}")]
    Lengths {
        /// The limit and the value got.
        reason: String,
    },
    /// The block size can't be used.
    #[error("block size must be between {min} and {max}, got {got}")]
    BlockSize {
        /// Smallest allowed.
        min: usize,
        /// Largest allowed.
        max: usize,
        /// The value got.
        got: usize,
    },
    /// A part of a block that is scored by itself doesn't fit the block.
    #[error("{name} must be {}, got {got}", allowed_sub_block(*.block))]
    SubBlock {
        /// Which setting.
        name: &'static str,
        /// Positions a block.
        block: usize,
        /// The value got.
        got: usize,
    },
    /// A row has more blocks than a softmax in fixed point can take.
    #[error("a row can be selected from at most {limit} key blocks, got {got}: use larger blocks")]
    RowBlocks {
        /// Most key blocks a row.
        limit: usize,
        /// The number got.
        got: usize,
    },
    /// A number lies outside its range or is NaN.
    #[error("{name} must be {allowed}, got {got}")]
    OutOfRange {
        /// Which setting.
        name: &'static str,
        /// The allowed range in words.
        allowed: &'static str,
        /// The value got.
        got: f64,
    },
    /// The bands don't fit the head.
    #[error("bands: {reason}")]
    Bands {
        /// The limit and the value got.
        reason: String,
    },
    /// A RoPE setting can't be used.
    #[error("RoPE: {reason}")]
    Rope {
        /// The limit and the value got.
        reason: String,
    },
    /// A block selection breaks its invariants.
    #[error("block selection: {reason}")]
    Selection {
        /// Which invariant, where, and the value got.
        reason: String,
    },
    /// A way to choose blocks that there isn't, or options that it can't use.
    #[error("selector: {reason}")]
    Selector {
        /// The limit and the value got.
        reason: String,
    },
    /// Settings of single heads that don't fit the heads or each other.
    #[error("head overrides: {reason}")]
    HeadOverrides {
        /// The limit and the value got.
        reason: String,
    },
    /// An element type can't be used here.
    #[error("{what}: element type {got} is not supported, expected {allowed}")]
    DType {
        /// Which tensor.
        what: &'static str,
        /// Supported types in words.
        allowed: &'static str,
        /// The type got.
        got: String,
    },
    /// Tensors live on different devices.
    #[error("{left} and {right} are on different devices")]
    Device {
        /// First tensor.
        left: &'static str,
        /// Second tensor.
        right: &'static str,
    },
    /// A cache can't take what was given.
    #[error("cache: {reason}")]
    Cache {
        /// The limit and the value got.
        reason: String,
    },
    /// A device failed to hand over a result.
    #[error("reading from the device failed: {reason}")]
    Read {
        /// What the device said.
        reason: String,
    },
}

fn allowed_sub_block(block: usize) -> String {
    if block < MIN_SUB_BLOCK {
        format!("{block} like the block")
    } else {
        format!("{MIN_SUB_BLOCK} to {MAX_SUB_BLOCK} and divide the block of {block}")
    }
}
