//! How well a model predicts a text: negative log-likelihood a token.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::llama::Llama;
use crate::model_error::{ModelError, read_f32};

/// Positions whose logits are held at a time.
const ROWS: usize = 256;

/// Predictions of a text of n tokens: position i predicts token i + 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Predictions {
    /// −log p of each token but the first, natural log; n − 1 of them.
    pub nll: Vec<f32>,
    /// The likeliest token at each position but the last; n − 1 of them.
    pub top1: Vec<u32>,
}

impl Predictions {
    /// Mean negative log-likelihood in nats; 0 for fewer than two tokens.
    pub fn mean_nll(&self) -> f64 {
        let sum: f64 = self.nll.iter().map(|&x| f64::from(x)).sum();
        sum / self.nll.len().max(1) as f64
    }

    /// exp of the mean NLL.
    pub fn perplexity(&self) -> f64 {
        self.mean_nll().exp()
    }

    /// Share of positions where both name the same likeliest token; 1 when there are none.
    pub fn top1_agreement(&self, other: &Self) -> f64 {
        let same = self.top1.iter().zip(&other.top1).filter(|(a, b)| a == b).count();
        let n = self.top1.len().min(other.top1.len());
        if n == 0 { 1.0 } else { same as f64 / n as f64 }
    }
}

impl Llama {
    /// Scores a text against the hidden states `[1, n, hidden]` of its tokens, a few rows at a
    /// time, so that n × vocab logits never exist at once.
    ///
    /// # Errors
    /// Another number of ids than hidden states, or the device failed.
    pub fn predictions(&self, hidden: &Tensor<3>, ids: &[u32]) -> Result<Predictions, ModelError> {
        let [_, n, width] = hidden.dims();
        if ids.len() != n {
            return Err(ModelError::Lengths { hidden: n, ids: ids.len() });
        }
        let device = hidden.device();
        let mut nll = Vec::with_capacity(n);
        let mut top1 = Vec::with_capacity(n);
        for start in (0..n - 1).step_by(ROWS) {
            let end = (start + ROWS).min(n - 1);
            let rows = end - start;
            let logits =
                self.logits(hidden.clone().slice([0..1, start..end, 0..width])).cast(DType::F32);
            let targets: Vec<i32> = ids[start + 1..=end].iter().map(|&id| id as i32).collect();
            let targets = Tensor::<2, Int>::from_data(
                TensorData::new(targets, [rows, 1]),
                (&device, DType::I32),
            );
            let chosen = logits.clone().gather(1, targets);
            let best = logits.clone().argmax(1);
            let max = logits.clone().max_dim(1);
            let log_total = (logits - max.clone()).exp().sum_dim(1).log() + max;
            nll.extend(read_f32(log_total - chosen)?);
            let best = best
                .try_into_data_dtype(DType::I32)
                .map_err(|error| ModelError::Read { reason: error.to_string() })?;
            let best = best
                .try_into_vec::<i32>()
                .map_err(|error| ModelError::Read { reason: format!("{error:?}") })?;
            top1.extend(best.into_iter().map(|id| id as u32));
        }
        Ok(Predictions { nll, top1 })
    }
}
