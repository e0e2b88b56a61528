//! Ways to choose blocks: Prism's, those it is compared with, and the true masses.
//!
//! Each method is a struct of its options in a file of its own, and a [`Selector`]: from Q and K to a
//! [`BlockSelection`], which every attention here reads. [`SelectorConfig`] holds any of them, for
//! settings and command lines. This is the reference on the host, in plain loops over f32 slices;
//! what runs on devices is tested against it.
//!
//! What a method says of a row is either a mass for each causal block, from which the budget chooses
//! as in [`crate::select`], or the blocks themselves. Both ways the forced blocks of the
//! [`SelectionRule`] are added (sink, recent, dense last rows), then rows are filled to its minimum
//! and cut to its maximum; of methods without masses the nearest blocks come first in both. A row
//! that would read nothing reads its diagonal block.

pub mod config;
pub mod dilated;
pub mod flexprefill;
pub mod input;
mod last_queries;
pub mod lsh;
pub mod mean_pool;
pub mod minference;
pub mod oracle;
pub mod outliers;
mod pooled;
pub mod prism;
pub mod second_order;
pub mod streaming;
pub mod top_k;
pub mod xattention;

pub use config::SelectorConfig;
pub use dilated::Dilated;
pub use flexprefill::FlexPrefill;
pub use input::{Head, Rows, Selector, SelectorInput};
pub use lsh::Lsh;
pub use mean_pool::MeanPool;
pub use minference::MInference;
pub use oracle::Oracle;
pub use outliers::Outliers;
pub use prism::Prism;
pub use second_order::SecondOrder;
pub use streaming::{Streaming, StreamingPattern};
pub use top_k::TopK;
pub use xattention::XAttention;
