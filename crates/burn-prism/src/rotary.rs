//! Angles of a rotary embedding.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Tensor, TensorData};
use prism_core::bands::{BandRule, Bands};
use prism_core::error::{PrismError, Result};
use prism_core::{BlockGrid, Rope, RopeLayout};

use crate::attention::DENSE_BLOCK;
use crate::fallback;
use crate::ops::{PrismBackend, RotateParams, Side};
use crate::plan;

/// Positions whose angles are computed for themselves.
const FINE: usize = 256;

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
    /// cosines and sines. Angles are computed in f64, because at 128K tokens f32 would be off by 1 %; by the
    /// addition theorem, from those of every 256th position and of the first 256, because it takes a tenth of
    /// the time.
    pub fn from_inv_freq(
        inv_freq: &[f64],
        factor: f64,
        layout: RopeLayout,
        positions: usize,
        device: &Device,
    ) -> Self {
        let pairs = inv_freq.len();
        let turn = |position: usize| inv_freq.iter().map(move |f| (position as f64 * f).sin_cos());
        let near: Vec<(f64, f64)> = (0..positions.min(FINE)).flat_map(turn).collect();
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions * pairs), Vec::with_capacity(positions * pairs));
        for first in (0..positions).step_by(FINE) {
            let far: Vec<(f64, f64)> = turn(first).collect();
            for near in near.chunks_exact(pairs.max(1)).take(positions - first) {
                for ((far_sin, far_cos), (near_sin, near_cos)) in far.iter().zip(near) {
                    cos.push(((far_cos * near_cos - far_sin * near_sin) * factor) as f32);
                    sin.push(((far_sin * near_cos + far_cos * near_sin) * factor) as f32);
                }
            }
        }
        let table = |mut values: Vec<f32>| {
            // Devices have no empty buffers.
            let shape = if values.is_empty() { [1, 1] } else { [positions, pairs] };
            values.resize(shape[0] * shape[1], 0.0);
            Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self { cos: table(cos), sin: table(sin), layout, rotary_dim: 2 * pairs, positions }
    }

    /// Positions, from 0.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Leading dims of a head that turn.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// `x` `[batch, heads, n, head_dim]` turned: row `i` by the angles of position `first + i`. In f32, and
    /// rounded once to the element type of `x`. Differentiable.
    ///
    /// # Errors
    /// Heads narrower than what turns, fewer positions than `first + n`, or another device.
    pub fn rotate(&self, x: Tensor<4>, first: usize) -> Result<Tensor<4>> {
        let [batch, _, n, head_dim] = x.dims();
        let end = first + n;
        self.check(head_dim, end)?;
        if self.cos.device() != x.device() {
            return Err(PrismError::Device { left: "x", right: "the rotary table" });
        }
        if n == 0 {
            return Ok(x);
        }
        // Blocks don't matter here; queries are what sits at the end of a sequence.
        let grids = vec![BlockGrid::new(1, n, end)?; batch];
        let bands = Bands::new(BandRule::Auto, None, head_dim, 1)?;
        let params = RotateParams::new(grids, self.layout, self.rotary_dim, bands, None);
        let (cos, sin) = (self.cos.clone().into_dispatch(), self.sin.clone().into_dispatch());
        let turned =
            fallback::turn::<Dispatch>(&x.into_dispatch(), (&cos, &sin), &params, Side::Queries);
        Ok(Tensor::from_dispatch(turned))
    }

    /// [`rotate`](Self::rotate) of Q and K of one length, which were checked against each other; by one
    /// launch where the device has a kernel for it.
    pub(crate) fn rotate_both(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        first: usize,
    ) -> Result<(Tensor<4>, Tensor<4>)> {
        let [batch, _, n, head_dim] = q.dims();
        let (kernel, _) = plan::choose_kernel(&q.device(), q.dtype(), head_dim, DENSE_BLOCK);
        if !kernel.is_cube() || n == 0 || self.rotary_dim == 0 {
            return Ok((self.rotate(q, first)?, self.rotate(k, first)?));
        }
        let end = first + n;
        self.check(head_dim, end)?;
        if self.cos.device() != q.device() {
            return Err(PrismError::Device { left: "q", right: "the rotary table" });
        }
        // The kernel takes whole sequences: the chunk is one whose first position has other angles. The
        // means that it also finds are of blocks from the chunk's start on, and of no use.
        let part = |table: &Tensor<2>| table.clone().slice_dim(0, first..end).into_dispatch();
        let grids = vec![BlockGrid::new(DENSE_BLOCK, n, n)?; batch];
        let bands = Bands::new(BandRule::Auto, None, head_dim, DENSE_BLOCK)?;
        let params = RotateParams::new(grids, self.layout, self.rotary_dim, bands, None);
        let (cos, sin) = (part(&self.cos), part(&self.sin));
        let (q, k) = (q.into_dispatch(), k.into_dispatch());
        let (q, k, ..) = <Dispatch as PrismBackend>::prism_rotate_and_pool(q, k, cos, sin, params);
        Ok((Tensor::from_dispatch(q), Tensor::from_dispatch(k)))
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
