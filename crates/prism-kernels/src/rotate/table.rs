//! Cosines and sines of every position.

use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;
use prism_core::{PrismError, Rope, RopeLayout};

/// Positions a step: a table of `n` positions takes cosines of `n / STEP + STEP` angles a pair.
const STEP: usize = 256;

/// By which angle each pair of dims turns at each position. A model needs one, made once, for all its
/// layers of one rotary embedding.
#[derive(Debug, Clone, new)]
pub struct RotaryTable {
    /// `[positions, rotary_dim / 2]` f32, times the model's factor on them if it has one.
    pub cos: Handle,
    /// Likewise.
    pub sin: Handle,
    /// Positions, from 0.
    pub positions: usize,
    /// Leading dims of a head that turn; even. The others stay.
    pub rotary_dim: usize,
    /// Which dims form a pair.
    pub layout: RopeLayout,
}

impl RotaryTable {
    /// The table of `rope` for heads of `head_dim` and positions below `positions`, computed in f64.
    ///
    /// # Errors
    /// A rotary dim that doesn't fit the head, θ or a scaling setting out of range.
    pub fn of(
        client: &Client,
        rope: &Rope,
        head_dim: usize,
        positions: usize,
    ) -> Result<Self, PrismError> {
        let inv_freq = rope.inv_freq(head_dim)?;
        let factor = rope.attention_factor();
        let pairs = inv_freq.len();
        // e^(iω(p + r)) = e^(iωp) · e^(iωr).
        let points = |step: usize, count: usize| -> Vec<(f64, f64)> {
            (0..count * pairs)
                .map(|i| ((i / pairs * step) as f64 * inv_freq[i % pairs]).sin_cos())
                .collect()
        };
        let (near, far) = (points(1, STEP), points(STEP, positions.div_ceil(STEP)));
        // A buffer is never empty.
        let len = (positions * pairs).max(1);
        let (mut cos, mut sin) = (vec![0.0f32; len], vec![0.0f32; len]);
        for p in 0..positions {
            let (base, rest) = (&far[p / STEP * pairs..], &near[p % STEP * pairs..]);
            for j in 0..pairs {
                let ((s, c), (t, d)) = (base[j], rest[j]);
                cos[p * pairs + j] = ((c * d - s * t) * factor) as f32;
                sin[p * pairs + j] = ((s * d + c * t) * factor) as f32;
            }
        }
        let upload = |values: &[f32]| client.create_from_slice(f32::as_bytes(values));
        Ok(Self::new(upload(&cos), upload(&sin), positions, 2 * pairs, rope.layout))
    }
}
