//! Rotary position embedding, rotate-half layout (pair `j` is dims `j` and `j + rotary_dim/2`).

use burn::tensor::{DType, Device, Tensor, TensorData};

/// Cosines and sines for a run of positions, shared by all layers of a forward pass.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// `[1, 1, n, rotary_dim / 2]`.
    cos: Tensor<4>,
    /// `[1, 1, n, rotary_dim / 2]`.
    sin: Tensor<4>,
    rotary: usize,
}

impl Rotation {
    /// For positions `start..start + n`, from the inverse frequency of each pair and the factor on
    /// cosines and sines. Angles are computed in f64: at 128K tokens f32 would be off by 1 %.
    pub fn new(
        inv_freq: &[f64],
        factor: f64,
        start: usize,
        n: usize,
        (dtype, device): (DType, &Device),
    ) -> Self {
        let angles: Vec<f64> = (start..start + n)
            .flat_map(|position| inv_freq.iter().map(move |f| position as f64 * f))
            .collect();
        let table = |values: Vec<f32>| {
            let data = TensorData::new(values, [1, 1, n, inv_freq.len()]);
            Tensor::from_data(data, (device, dtype))
        };
        Self {
            cos: table(angles.iter().map(|a| (a.cos() * factor) as f32).collect()),
            sin: table(angles.iter().map(|a| (a.sin() * factor) as f32).collect()),
            rotary: 2 * inv_freq.len(),
        }
    }

    /// Of all rows of several, in order.
    ///
    /// All must turn equally many dims, and one there must be.
    pub(crate) fn join(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let rotary = parts[0].rotary;
        let (cos, sin) = parts.into_iter().map(|part| (part.cos, part.sin)).unzip();
        Self { cos: Tensor::cat(cos, 2), sin: Tensor::cat(sin, 2), rotary }
    }

    /// The part for positions `range` of the run.
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let part = |table: &Tensor<4>| table.clone().slice_dim(2, range.clone());
        Self { cos: part(&self.cos), sin: part(&self.sin), rotary: self.rotary }
    }

    /// Rotates `[batch, heads, n, head_dim]`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, heads, n, head_dim] = x.dims();
        let half = self.rotary / 2;
        let part = |from: usize, to: usize| x.clone().slice([0..batch, 0..heads, 0..n, from..to]);
        let (a, b) = (part(0, half), part(half, self.rotary));
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let mut parts = vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
        if self.rotary < head_dim {
            parts.push(part(self.rotary, head_dim));
        }
        Tensor::cat(parts, 3)
    }
}
