//! Angles of a rotary embedding.

use burn::tensor::{DType, Device, Tensor, TensorData};
use prism_core::error::{PrismError, Result};
use prism_core::{Rope, RopeLayout};

/// By which angle each pair of dims turns at each position: made once for all layers of a model.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    /// `[positions, rotary_dim / 2]` in f32; one element where nothing turns.
    pub(crate) cos: Tensor<2>,
    /// Likewise.
    pub(crate) sin: Tensor<2>,
    pub(crate) layout: RopeLayout,
    pub(crate) rotary_dim: usize,
    pub(crate) positions: usize,
}

impl RotaryTable {
    /// The table of `rope` for heads of `head_dim` and positions below `positions`.
    ///
    /// # Errors
    /// A rotary dim that doesn't fit the head, θ or a scaling setting out of range.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize, device: &Device) -> Result<Self> {
        let (inv_freq, factor) = (rope.inv_freq(head_dim)?, rope.attention_factor());
        Ok(Self::from_inv_freq(&inv_freq, factor, rope.layout, positions, device))
    }

    /// The table of given inverse frequencies, one a pair in radians a position, with a factor on
    /// cosines and sines. Angles are computed in f64: at 128K tokens f32 would be off by 1 %.
    pub fn from_inv_freq(
        inv_freq: &[f64],
        factor: f64,
        layout: RopeLayout,
        positions: usize,
        device: &Device,
    ) -> Self {
        let angles = || (0..positions).flat_map(|p| inv_freq.iter().map(move |f| p as f64 * f));
        let table = |mut values: Vec<f32>| {
            // Devices have no empty buffers.
            let shape = if values.is_empty() { [1, 1] } else { [positions, inv_freq.len()] };
            values.resize(shape[0] * shape[1], 0.0);
            Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self {
            cos: table(angles().map(|angle| (angle.cos() * factor) as f32).collect()),
            sin: table(angles().map(|angle| (angle.sin() * factor) as f32).collect()),
            layout,
            rotary_dim: 2 * inv_freq.len(),
            positions,
        }
    }

    /// Positions, from 0.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Leading dims of a head that turn.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Checks that it goes with heads of `head_dim` and sequences of up to `keys` keys.
    pub(crate) fn check(&self, head_dim: usize, keys: usize) -> Result<()> {
        if self.rotary_dim > head_dim {
            let got = self.rotary_dim;
            let reason = format!("the table turns {got} dims, the heads have {head_dim}");
            return Err(PrismError::Rope { reason });
        }
        if self.rotary_dim > 0 && self.positions < keys {
            let got = self.positions;
            let reason = format!("the table has {got} positions, the longest sequence {keys}");
            return Err(PrismError::Rope { reason });
        }
        Ok(())
    }
}
