//! Prism block-sparse attention, the part that needs no tensors: every rule stands here once, and
//! every backend is tested against it.
//!
//! Training-free sparse prefill after *Prism: Spectral-Aware Block-Sparse Attention*
//! (arXiv 2602.08426). Reading order: [`shape`] and [`grid`] (where tokens and blocks are),
//! [`rope`] and [`bands`] (what pooling does to a head's dims), [`scores`] and [`second_order`] (how
//! much blocks want each other), [`masses`] (scores as probabilities), [`select`] (the rule), [`selection`] (its
//! result), [`selectors`] (other ways to choose), [`oracle`] (what right means), [`cost`] (what it takes).
//!
//! *block*: B consecutive positions. *density*: selected over causal blocks. *mass*: softmax
//! probability. *LSE*: log-sum-exp of a row, natural log. Tensors are
//! `[batch, heads, length, head_dim]`.

pub mod bands;
pub mod cost;
pub mod error;
pub mod grid;
pub mod masses;
pub mod oracle;
pub mod rope;
pub mod scores;
pub mod second_order;
pub mod select;
pub mod selection;
pub mod selectors;
pub mod shape;

pub use bands::{BandRule, Bands};
pub use cost::Cost;
pub use error::{PrismError, Result};
pub use grid::{BlockGrid, Side};
pub use rope::{Rope, RopeLayout, RopeScaling};
pub use scores::{Calibration, Scoring};
pub use select::{Budget, SelectionRule};
pub use selection::BlockSelection;
pub use selectors::SelectorConfig;
pub use shape::{AttentionShape, SequenceLengths};
