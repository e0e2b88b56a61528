//! Selection by scores within spectral bands, as [`prism_core::scores`].

use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, FloatDType, Shape, TensorMetadata};
use prism_core::scores::SILENT_RMS;
use prism_core::select::ByMass;
use prism_core::{BlockGrid, Calibration};

use super::choice::{Choice, RowSource};
use super::rule::Rule;
use super::softmax::{masses, probabilities, scores};
use super::tensor::{Bool, Float, Int};
use crate::ops::{PrismBackend, SelectParams, Side};

/// Selection from pooled Q `[batch, q_heads, rows, head_dim]`, pooled K
/// `[batch, kv_heads, key_blocks, head_dim]` and the energy of earlier query blocks
/// `[batch, q_heads, 4]`: words `[batch, q_heads, rows, ceil(key_blocks / 32)]` and counts
/// `[batch, q_heads, rows]`.
pub fn select<B: PrismBackend>(
    pooled_q: FloatTensor<B>,
    pooled_k: FloatTensor<B>,
    history: FloatTensor<B>,
    params: &SelectParams,
) -> (IntTensor<B>, IntTensor<B>) {
    let (q, k) = (Float::<B>(pooled_q), Float::<B>(pooled_k));
    let history = Float::<B>(history);
    let [_, heads, ..] = q.dims::<4>();
    let SelectParams { grids, rule, more_follows, .. } = params;
    Rule { grids, rule, more_follows: *more_follows, heads }.select(
        &q.device(),
        |sequences, grid| {
            let of = |x: &Float<B>| x.clone().slice(0, sequences.clone());
            Heads::new(of(&q), of(&k), of(&history), grid, params)
        },
    )
}

/// Pools with the backend's own operation and selects likewise.
pub fn select_blocks<B: PrismBackend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    params: SelectParams,
) -> (IntTensor<B>, IntTensor<B>) {
    let (shape, device) = (q.shape(), q.device());
    let history = Shape::new([shape[0], shape[1], 4]);
    let history = B::float_zeros(history, &device, FloatDType::F32);
    let q = B::prism_pool(q, params.grids.clone(), Side::Queries);
    let k = B::prism_pool(k, params.grids.clone(), Side::Keys);
    B::prism_select(q, k, history, params)
}

/// The heads of some sequences on one grid.
pub(super) struct Heads<B: Backend> {
    /// Of each band: queries over √d · τ `[batch, q_heads, rows, dims]` and transposed keys
    /// `[batch, kv_heads, dims, key_blocks]`.
    bands: Vec<(Float<B>, Float<B>)>,
    row_elements: usize,
}

impl<B: Backend> Heads<B> {
    /// Bands that hold dims.
    pub(super) fn bands(&self) -> usize {
        self.bands.len()
    }

    /// Scores of band `z`, `[batch, q_heads, rows, keys]`, of the first `keys` blocks.
    pub(super) fn scores(&self, z: usize, rows: Range<usize>, keys: usize) -> Float<B> {
        let (q, k) = &self.bands[z];
        scores(q.clone().slice(2, rows), k.clone().slice(3, 0..keys))
    }

    pub(super) fn new(
        q: Float<B>,
        k: Float<B>,
        history: Float<B>,
        grid: &BlockGrid,
        params: &SelectParams,
    ) -> Self {
        let device = q.device();
        let [batch, heads, ..] = q.dims::<4>();
        let q = q.slice(2, 0..grid.rows());
        let k = k.slice(2, 0..grid.key_blocks());
        let energies = match params.calibration {
            Calibration::Off => None,
            calibration => {
                let history = history.reshape([batch, heads, 1, 4]);
                let (q_energy, k_energy) = (energy(&q, params), energy(&k, params));
                let (q_energy, k_energy) = if calibration == Calibration::Causal {
                    let diagonals = grid.first_block()..grid.key_blocks();
                    (q_energy.cumsum(2), k_energy.cumsum(2).slice(2, diagonals))
                } else {
                    (q_energy.sum(2), k_energy.sum(2))
                };
                Some((q_energy + history, repeat_heads(k_energy, heads)))
            }
        };
        let all_bands = [params.bands.high(), params.bands.low()];
        let bands = (0..2).filter(|&z| !all_bands[z].is_empty()).map(|z| {
            let dims = all_bands[z];
            let indices = Int::from_list(dims.iter().map(|&c| c as i32).collect(), &device);
            let k = k.clone().select(3, indices.clone()).transpose();
            let q = q.clone().select(3, indices) * (1.0 / (dims.len() as f32).sqrt());
            match &energies {
                None => (q, k),
                Some((q_energy, k_energy)) => {
                    let share = dims.len() as f32 / params.bands.head_dim() as f32;
                    let tau =
                        ratio(q_energy, z, params) * ratio(k_energy, z, params) * share.sqrt();
                    let tau = tau.clone().fill(&!tau.gt(0.0), 1.0);
                    (q / tau, k)
                }
            }
        });
        Self { bands: bands.collect(), row_elements: batch * heads * grid.key_blocks() }
    }
}

impl<B: Backend> RowSource<B> for Heads<B> {
    fn row_elements(&self) -> usize {
        self.row_elements
    }

    fn choose(&self, rows: Range<usize>, future: &Bool<B>) -> Choice<B> {
        let [.., blocks] = future.dims::<4>();
        let band = |z| masses(probabilities(self.scores(z, rows.clone(), blocks), future), future);
        Choice::Masses((0..self.bands()).map(band).collect(), ByMass::Budget)
    }
}

/// Energies of pooled vectors as [`prism_core::scores::BandEnergy`] counts them,
/// `[batch, heads, blocks, 4]`: high, low, all, blocks. Vectors that aren't finite count nothing.
fn energy<B: Backend>(x: &Float<B>, params: &SelectParams) -> Float<B> {
    let device = x.device();
    let squares = x.clone() * x.clone();
    let usable = squares.clone().sum(3).le(f32::MAX);
    let squares = squares.fill(&!usable.clone(), 0.0);
    let within = |dims: &[usize]| {
        let mut mask = vec![0.0; params.bands.head_dim()];
        dims.iter().for_each(|&c| mask[c] = 1.0);
        let len = mask.len();
        let mask = Float::from_list(mask, &device).reshape([1, 1, 1, len]);
        (squares.clone() * mask).sum(3)
    };
    let (high, low) = (within(params.bands.high()), within(params.bands.low()));
    let [batch, heads, blocks, _] = x.dims();
    let columns = vec![high, low, squares.clone().sum(3), usable.float()];
    Float::join(columns, 3, [batch, heads, blocks, 4], 0.0, &device)
}

/// RMS of band `z` over RMS of all dims.
fn ratio<B: Backend>(energy: &Float<B>, z: usize, params: &SelectParams) -> Float<B> {
    let column = |c: usize| energy.clone().slice(3, c..c + 1);
    let rms = |c: usize, dims: usize| (column(c) / (column(3) * dims as f32).at_least(1.0)).sqrt();
    let dims = [params.bands.high().len(), params.bands.low().len()][z];
    rms(z, dims) / rms(2, params.bands.head_dim()).at_least(SILENT_RMS as f32)
}

/// `[batch, kv_heads, n, 4]` for each query head, `[batch, heads, n, 4]`.
fn repeat_heads<B: Backend>(x: Float<B>, heads: usize) -> Float<B> {
    let [batch, kv_heads, n, columns] = x.dims();
    x.reshape([batch, kv_heads, 1, n * columns])
        .expand([batch, kv_heads, heads / kv_heads, n * columns])
        .reshape([batch, heads, n, columns])
}
