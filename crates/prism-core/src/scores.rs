//! Block scores: how much each query block wants each key block, from pooled vectors alone. Here
//! the paper's, within spectral bands; [`crate::second_order`] has the other way.
//!
//! Per band z: S_z\[u, v\] = (q̄_u,z · k̄_v,z) / (√d_z · τ_z), where the temperature
//! τ_z = √(d_z/d) · (RMS q̄_z / RMS q̄) · (RMS k̄_z / RMS k̄) gives back the energy that pooling took
//! from the band (paper §3.3). One τ for a (sequence, head, band).

use serde::{Deserialize, Serialize};

use crate::bands::Bands;
use crate::error::{PrismError, Result};
use crate::grid::BlockGrid;

/// How blocks are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Scoring {
    /// By means of whole blocks within spectral bands (the paper): this module.
    #[default]
    Bands,
    /// By means of sub-blocks and the variance of their keys: [`crate::second_order`]. It has
    /// neither bands nor a calibration.
    SecondOrder {
        /// Positions a query sub-block: 16 to 128, dividing the block; the block itself where that
        /// is below 16.
        query_sub: usize,
        /// Positions a key sub-block, within the same limits.
        key_sub: usize,
    },
}

/// Smallest sub-block of blocks that are not smaller themselves.
pub const MIN_SUB_BLOCK: usize = 16;
/// Largest sub-block.
pub const MAX_SUB_BLOCK: usize = 128;

impl Scoring {
    /// Second order with query sub-blocks of 32 and key sub-blocks of 16: what loses least for its
    /// cost where it was measured (`docs/numerics.md`).
    pub fn second_order() -> Self {
        Self::SecondOrder { query_sub: 32, key_sub: 16 }
    }

    /// Checks the sub-blocks against the size of the blocks.
    ///
    /// # Errors
    /// A sub-block outside 16 to 128 or that doesn't divide the block; for blocks below 16, any
    /// but the block itself.
    pub fn validate(&self, block: usize) -> Result<()> {
        let Self::SecondOrder { query_sub, key_sub } = *self else {
            return Ok(());
        };
        check_sub_block("query_sub", query_sub, block)?;
        check_sub_block("key_sub", key_sub, block)
    }

    /// Entries of the softmax of a row that sees `keys` keys.
    pub fn row_blocks(&self, block: usize, keys: usize) -> usize {
        keys.div_ceil(match *self {
            Self::Bands => block,
            Self::SecondOrder { key_sub, .. } => key_sub,
        })
    }
}

/// Checks a sub-block against the size of the blocks: see [`Scoring::validate`].
pub(crate) fn check_sub_block(name: &'static str, got: usize, block: usize) -> Result<()> {
    let sizes = MIN_SUB_BLOCK..=MAX_SUB_BLOCK;
    let fits = match block < MIN_SUB_BLOCK {
        true => got == block,
        false => sizes.contains(&got) && block.is_multiple_of(got),
    };
    if fits { Ok(()) } else { Err(PrismError::SubBlock { name, block, got }) }
}

/// Over which blocks the calibration's RMS runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Calibration {
    /// All blocks of the call (the paper).
    #[default]
    Global,
    /// For query block u, blocks ≤ u: a prompt in block-aligned chunks selects what the whole
    /// prompt selects.
    Causal,
    /// None: τ = 1.
    Off,
}

/// Sums of squares of pooled vectors, in total and within each band.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BandEnergy {
    /// Over the dims of the high band.
    pub high: f64,
    /// Over the dims of the low band.
    pub low: f64,
    /// Over all dims.
    pub all: f64,
    /// Pooled vectors counted.
    pub blocks: f64,
}

/// Below this RMS a head counts as silent: guards the division for all-zero inputs.
pub const SILENT_RMS: f64 = 1e-6;

impl BandEnergy {
    /// Adds one pooled vector. One that isn't finite is left out, so that a NaN stays with the
    /// rows that read it.
    pub fn add(&mut self, vector: &[f32], bands: &Bands) {
        let sum = |dims: &[usize]| dims.iter().map(|&c| f64::from(vector[c]).powi(2)).sum::<f64>();
        let all: f64 = vector.iter().map(|&x| f64::from(x).powi(2)).sum();
        if all.is_finite() {
            self.high += sum(bands.high());
            self.low += sum(bands.low());
            self.all += all;
            self.blocks += 1.0;
        }
    }

    /// RMS of the high and the low band over RMS of all dims.
    fn ratios(&self, bands: &Bands) -> [f64; 2] {
        let rms = |energy: f64, dims: usize| (energy / (self.blocks * dims as f64).max(1.0)).sqrt();
        let all = rms(self.all, bands.head_dim()).max(SILENT_RMS);
        [rms(self.high, bands.high().len()) / all, rms(self.low, bands.low().len()) / all]
    }
}

/// Temperatures τ of the high and the low band; 1 for a silent band, whose scores are 0 anyway.
pub fn temperatures(q: &BandEnergy, k: &BandEnergy, bands: &Bands) -> [f64; 2] {
    let (q, k) = (q.ratios(bands), k.ratios(bands));
    let tau = |z: usize, dims: usize| {
        let tau = (dims as f64 / bands.head_dim() as f64).sqrt() * q[z] * k[z];
        if tau > 0.0 { tau } else { 1.0 }
    };
    [tau(0, bands.high().len()), tau(1, bands.low().len())]
}

/// Pooled vectors of one head of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct PooledHead<'a> {
    /// Query block means, `[rows, head_dim]`.
    pub q: &'a [f32],
    /// Key block means of the kv head, `[key_blocks, head_dim]`.
    pub k: &'a [f32],
    /// Energy of earlier query blocks of the same prompt, when this is a later chunk of it.
    pub history: BandEnergy,
}

/// Visits the rows of one head in order with the scores of the bands that hold dims, high first,
/// over the causal blocks of the row.
pub fn for_each_row(
    head: PooledHead,
    grid: &BlockGrid,
    bands: &Bands,
    calibration: Calibration,
    mut visit: impl FnMut(usize, &[Vec<f32>]),
) {
    let d = bands.head_dim();
    let q_rows = || head.q.chunks_exact(d).take(grid.rows());
    let k_rows = || head.k.chunks_exact(d).take(grid.key_blocks());
    let widths: Vec<f64> = bands.iter().map(|dims| dims.len() as f64).collect();
    let keys: Vec<Vec<f64>> =
        bands.iter().map(|dims| k_rows().flat_map(|row| gather(row, dims)).collect()).collect();

    let mut q_energy = head.history;
    let mut k_energy = BandEnergy::default();
    let mut keys_counted = 0;
    if calibration == Calibration::Global {
        q_rows().for_each(|row| q_energy.add(row, bands));
        k_rows().for_each(|row| k_energy.add(row, bands));
    }
    let mut scores = vec![Vec::with_capacity(grid.key_blocks()); keys.len()];
    for (row, q) in q_rows().enumerate() {
        let causal = grid.causal_blocks(row);
        if calibration == Calibration::Causal {
            q_energy.add(q, bands);
            k_rows().take(causal).skip(keys_counted).for_each(|k| k_energy.add(k, bands));
            keys_counted = causal;
        }
        let tau = match calibration {
            Calibration::Off => [1.0; 2],
            _ => temperatures(&q_energy, &k_energy, bands),
        };
        let tau = if bands.high().is_empty() { [tau[1], tau[1]] } else { tau };
        for (z, dims) in bands.iter().enumerate() {
            let q: Vec<f64> = gather(q, dims).collect();
            let scale = 1.0 / (widths[z].sqrt() * tau[z]);
            scores[z].clear();
            scores[z].extend(
                keys[z]
                    .chunks_exact(dims.len())
                    .take(causal)
                    .map(|k| (q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * scale) as f32),
            );
        }
        visit(row, &scores);
    }
}

fn gather<'a>(row: &'a [f32], dims: &'a [usize]) -> impl Iterator<Item = f64> + 'a {
    dims.iter().map(|&c| f64::from(row[c]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(128, 32, 16)]
    #[case(128, 128, 128)]
    #[case(100, 25, 50)]
    #[case(1 << 20, 128, 16)]
    #[case(8, 8, 8)]
    fn sub_blocks_that_fit(#[case] block: usize, #[case] query_sub: usize, #[case] key_sub: usize) {
        Scoring::SecondOrder { query_sub, key_sub }.validate(block).unwrap();
    }

    #[rstest]
    #[case(128, 8, 16, "query_sub must be 16 to 128 and divide the block of 128, got 8")]
    #[case(128, 32, 48, "key_sub must be 16 to 128 and divide the block of 128, got 48")]
    #[case(256, 256, 16, "query_sub must be 16 to 128 and divide the block of 256, got 256")]
    #[case(64, 128, 16, "query_sub must be 16 to 128 and divide the block of 64, got 128")]
    #[case(64, 64, 0, "key_sub must be 16 to 128 and divide the block of 64, got 0")]
    #[case(8, 8, 4, "key_sub must be 8 like the block, got 4")]
    fn sub_blocks_that_do_not_fit(
        #[case] block: usize,
        #[case] query_sub: usize,
        #[case] key_sub: usize,
        #[case] says: &str,
    ) {
        let error = Scoring::SecondOrder { query_sub, key_sub }.validate(block).unwrap_err();
        assert_eq!(error.to_string(), says);
    }
}
