//! The operations that backends supply, as a Burn backend extension.
//!
//! Arguments are validated before they get here; shapes are those of [`crate::attention`].
//! Default bodies are written in Burn tensor ops ([`crate::fallback`]) and run on any backend.

#![cfg_attr(feature = "ndarray", allow(deprecated))] // Burn deprecates it, users still have it.

use burn::backend::{
    Backend, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use prism_core::BlockGrid;

#[cfg(feature = "fusion")]
use crate::backends::fusion;
use crate::fallback;

pub use crate::params::{
    AntidiagonalParams, AttendParams, ChooseParams, OutliersParams, RotateParams,
    SecondOrderParams, SelectParams,
};
pub use prism_core::Side;
pub use prism_core::select::{ByMass, Prefix};

/// Rotated Q and K, and the means of their blocks, as
/// [`prism_rotate_and_pool`](PrismBackend::prism_rotate_and_pool) returns them.
pub type RotatedTensors<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// Prism's operations on backend primitives.
#[backend_extension(
    Cube: cfg(any(feature = "cpu", feature = "cuda", feature = "rocm", feature = "wgpu")),
    Fusion: cfg(feature = "fusion"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Autodiff: cfg(feature = "autodiff"),
)]
pub trait PrismBackend: Backend {
    /// Block means of `x` `[batch, heads, length, head_dim]` in f32:
    /// `[batch, heads, blocks, head_dim]`, over the tokens actually present; 0 for blocks that a
    /// shorter sequence lacks. `blocks` is that of the longest sequence.
    #[fusion(meta = |x, grids, side| fusion::pooled(x, grids, *side))]
    fn prism_pool(x: FloatTensor<Self>, grids: Vec<BlockGrid>, side: Side) -> FloatTensor<Self> {
        fallback::pool::<Self>(x, &grids, side)
    }

    /// Q `[batch, q_heads, q_len, head_dim]` and K `[batch, kv_heads, kv_len, head_dim]` turned by the
    /// angles of their positions, each rounded once; 0 outside of their sequences. Then the means that
    /// [`prism_pool`](Self::prism_pool) finds in both, of Q without the prescale.
    ///
    /// `cos` and `sin` are `[positions, rotary_dim / 2]` in f32, for all positions of the grids; of any
    /// shape where nothing turns.
    #[fusion(meta = |q, k, _cos, _sin, params| fusion::rotated(q, k, &params.grids))]
    fn prism_rotate_and_pool(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        params: RotateParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        fallback::rotate_and_pool::<Self>(q, k, cos, sin, &params)
    }

    /// Selection from pooled Q `[batch, q_heads, rows, head_dim]`, pooled K
    /// `[batch, kv_heads, key_blocks, head_dim]` and the energy of earlier query blocks
    /// `[batch, q_heads, 4]` (high, low, all, number of blocks), all f32.
    ///
    /// Returns words `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts
    /// `[batch, q_heads, rows]`, both i32; bit `v % 32` of word `v / 32` says that the row reads
    /// key block `v`.
    #[fusion(meta = |q, _k, _history, params| fusion::selected(q, params))]
    fn prism_select(
        pooled_q: FloatTensor<Self>,
        pooled_k: FloatTensor<Self>,
        history: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        fallback::select::<Self>(pooled_q, pooled_k, history, &params)
    }

    /// Selection from Q and K themselves, as [`prism_pool`](Self::prism_pool) and
    /// [`prism_select`](Self::prism_select) make it, without earlier query blocks; for backends that
    /// pool both at once.
    #[fusion(meta = |q, _k, params| fusion::selected(q, params))]
    fn prism_select_blocks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: SelectParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        fallback::select_blocks::<Self>(q, k, params)
    }

    /// Means and variances (population, each dim by itself) of the key blocks of `x`
    /// `[batch, kv_heads, length, head_dim]` in f32, each `[batch, kv_heads, blocks, head_dim]`,
    /// over the tokens actually present; 0 for blocks that a shorter sequence lacks.
    #[fusion(meta = |x, grids| fusion::moments(x, grids))]
    fn prism_pool_moments(
        x: FloatTensor<Self>,
        grids: Vec<BlockGrid>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        fallback::pool_moments::<Self>(x, &grids)
    }

    /// Selection by second-order scores, from means of query sub-blocks
    /// `[batch, q_heads, query sub-blocks, head_dim]` and means and variances of key sub-blocks
    /// `[batch, kv_heads, key sub-blocks, head_dim]`, all f32; the result is that of
    /// [`prism_select`](Self::prism_select).
    #[fusion(meta = |q, _k, _variances, params| fusion::selected_by_second_order(q, params))]
    fn prism_select_second_order(
        q_means: FloatTensor<Self>,
        k_means: FloatTensor<Self>,
        k_variances: FloatTensor<Self>,
        params: SecondOrderParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        fallback::select_second_order::<Self>(q_means, k_means, k_variances, &params)
    }

    /// Selection with outlier keys apart, from Q `[batch, q_heads, q_len, head_dim]` and K
    /// `[batch, kv_heads, kv_len, head_dim]` themselves; the result is that of
    /// [`prism_select`](Self::prism_select).
    #[fusion(meta = |q, _k, params| fusion::selected_outliers(q, params))]
    fn prism_select_outliers(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: OutliersParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        fallback::selectors::select_outliers::<Self>(q, k, &params)
    }

    /// Integer masses of some rows, `[batch, q_heads, rows, blocks]` i32, whose blocks are those that the last
    /// of the rows may read, from Q `[batch, q_heads, q_len, head_dim]` and K `[batch, kv_heads, kv_len,
    /// head_dim]` of sequences on one grid. What lies after a row's causal blocks doesn't count.
    #[fusion(meta = |q, _k, params| fusion::antidiagonal(q, params))]
    fn prism_antidiagonal_masses(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        params: AntidiagonalParams,
    ) -> IntTensor<Self> {
        fallback::antidiagonal_masses::<Self>(q, k, &params)
    }

    /// Softmax of `scores` `[batch, heads, rows, keys]` f32, added up by key and by distance, `[batch, heads, 1,
    /// keys]` each. Rows are the last queries in reverse order, the `first` latest ones left out: row r sees the
    /// first keys − `first` − r of the keys, the last of which is at distance 0; `first` + rows ≤ keys. A NaN counts for nothing and an
    /// infinite score as the largest finite number.
    #[fusion(meta = |scores, _first| fusion::lines(scores))]
    fn prism_line_sums(
        scores: FloatTensor<Self>,
        first: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        fallback::line_sums::<Self>(scores, first)
    }

    /// Selection of some rows by integer masses `[batch, q_heads, rows, bands · blocks]`, i32, whose blocks are
    /// those that the last of the rows may read; what lies after a row doesn't count.
    ///
    /// Returns words `[batch, q_heads, rows, words_per_row]` and counts `[batch, q_heads, rows, 1]`, both i32.
    #[fusion(meta = |masses, params| fusion::chosen(masses, params))]
    fn prism_choose(
        masses: IntTensor<Self>,
        params: ChooseParams,
    ) -> (IntTensor<Self>, IntTensor<Self>) {
        fallback::choose::<Self>(masses, &params)
    }

    /// The heaviest elements of each row of `masses` `[batch, heads, rows, length]`, by (mass descending, index
    /// ascending), up to a limit `[batch, heads, rows, 1]`: 1 for each of them and 0 for the others, in the
    /// shape of the masses. All i32; negative masses take no part.
    #[fusion(meta = |masses, _limits, _prefix| masses.clone())]
    fn prism_heaviest(
        masses: IntTensor<Self>,
        limits: IntTensor<Self>,
        prefix: Prefix,
    ) -> IntTensor<Self> {
        fallback::heaviest_prefix::<Self>(masses, limits, prefix)
    }

    /// Attention over the selected blocks: output `[batch, q_heads, q_len, head_dim]` in the
    /// dtype of Q, and LSE `[batch, q_heads, q_len]` in f32.
    #[fusion(meta = |q, _k, _v, _words, _params| fusion::attended(q))]
    fn prism_attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        words: IntTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        fallback::attend::<Self>(q, k, v, Some(words), &params)
    }

    /// Exact causal attention: [`prism_attend`](Self::prism_attend) over every causal block.
    #[fusion(meta = |q, _k, _v, _params| fusion::attended(q))]
    fn prism_attend_dense(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        params: AttendParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        fallback::attend::<Self>(q, k, v, None, &params)
    }

    /// x·W `[.., N]` of x `[.., K]` and W `[K, N]`, any rank from 2.
    #[fusion(meta = |x, weight| fusion::product(x, weight.shape[1]))]
    fn prism_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        fallback::linear::<Self>(x, weight)
    }

    /// [`prism_linear`](Self::prism_linear) plus a residual `[.., N]`.
    #[fusion(meta = |x, weight, _residual| fusion::product(x, weight.shape[1]))]
    fn prism_linear_residual(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        residual: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        fallback::linear_residual::<Self>(x, weight, residual)
    }

    /// silu(x·gate) · (x·up) `[.., F]` of x `[.., K]` and both weights in one, `[K, 2F]`, their columns
    /// alternating in groups of [`INTERLEAVE`](crate::swiglu::INTERLEAVE).
    #[fusion(meta = |x, weight| fusion::product(x, weight.shape[1] / 2))]
    fn prism_swiglu(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        fallback::swiglu::<Self>(x, weight)
    }
}
