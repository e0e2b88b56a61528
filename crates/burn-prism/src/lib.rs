//! Prism block-sparse attention for [Burn](burn): long prompts, fast, without retraining.
//!
//! Swap the attention of your Llama or Qwen for [`PrismAttention`]:
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use burn_prism::{AttentionOptions, PrismConfig};
//!
//! let device = Device::flex();
//! let q = Tensor::<4>::random([1, 6, 300, 64], Distribution::Default, &device);
//! let k = Tensor::<4>::random([1, 2, 300, 64], Distribution::Default, &device);
//! let v = Tensor::<4>::random([1, 2, 300, 64], Distribution::Default, &device);
//!
//! let attention = PrismConfig::llama3().with_dense_below(0).init();
//! let result = attention.forward_with(q, k, v, &AttentionOptions::default())?;
//! assert_eq!(result.output.dims(), [1, 6, 300, 64]);
//! println!("{}: density {:.2}", result.report, result.report.density()?);
//! # Ok::<(), burn_prism::PrismError>(())
//! ```
//!
//! Reading order: [`config`] (settings) with [`heads`] (of single heads), [`attention`] (functions on tensors), [`module`] (what
//! goes into a model), [`cache`] (prompts in chunks), [`packed`] (sequences end to end), [`mod@selectors`] (other methods), [`plan`] (what will run, before it runs),
//! [`report`] (what ran), [`mod@rope_probe`] (whether a config's RoPE is the model's), [`mod@linear`] and [`mod@swiglu`] (the projections around attention) with
//! [`mod@plan_linear`], [`rotated`] with [`rotary`] (Q and K before RoPE), [`ops`] (what a backend supplies).
//!
//! # Feature flags
//! - `flex` (default): Burn's pure-Rust CPU backend, with native kernels.
//! - `ndarray`: Burn's ndarray backend, in tensor ops.
//! - `cpu`, `cuda`, `rocm`, `wgpu`, `vulkan`, `metal`: CubeCL's runtimes, with kernels of `prism_kernels`.
//! - `cuda-cpp`: CUDA through CubeCL's C++ compiler in place of its LLVM one.
//! - `fusion` (default): Burn's operator fusion on CubeCL's runtimes. It must be on here where any
//!   crate of the build turns it on in Burn, since it changes the backend that Burn dispatches to.
//! - `autotune`: Burn chooses among its own kernels by timing them.
//! - `autodiff`: gradients; kernels as long as nothing is tracked, tensor ops otherwise.

mod backends;
mod check;
#[doc(hidden)]
pub mod fallback;
#[cfg(feature = "flex")]
#[doc(hidden)]
pub mod flex;
mod pooled;
mod select;

pub mod attention;
pub mod cache;
pub mod config;
pub mod heads;
pub mod linear;
pub mod module;
pub mod ops;
pub mod packed;
mod params;
pub mod plan;
pub mod plan_linear;
mod plan_selectors;
pub mod report;
pub mod rope_mismatch;
pub mod rope_probe;
pub mod rotary;
pub mod rotated;
pub mod selected;
pub mod selectors;
pub mod swiglu;

pub use attention::{
    AttentionOptions, AttentionOutput, PrismOutput, block_sparse_attention, dense_attention,
    prism_attention, select_blocks,
};
pub use cache::PrismCache;
pub use config::PrismConfig;
pub use heads::HeadOverride;
pub use linear::{LinearOptions, linear, linear_with};
pub use module::PrismAttention;
pub use packed::{PackedOutput, prism_attention_packed};
pub use plan::{Plan, Refused, Step, plan, plan_rotated};
pub use plan_linear::{LinearKernel, LinearPlan, plan_linear, plan_swiglu};
pub use prism_core::{
    AttentionShape, BandRule, BlockGrid, BlockSelection, Budget, Calibration, Cost, PrismError,
    Result, Rope, RopeLayout, RopeScaling, Scoring, SelectionRule, SelectorConfig, SequenceLengths,
};
pub use report::{Path, Reason, Report};
pub use rope_mismatch::{RopeMismatch, RopeProbe, WrongBands};
pub use rope_probe::probe_rope;
pub use rotary::RotaryTable;
pub use rotated::{Rotated, prism_attention_rotated, rotate_and_pool};
pub use selected::SelectedBlocks;
pub use selectors::select_blocks_by;
pub use swiglu::{GateUp, interleave, swiglu};

/// The code of `docs/add-to-your-model.md`, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/add-to-your-model.md")]
struct AddToYourModel;

/// The code of `docs/selectors.md`.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/selectors.md")]
struct Selectors;
