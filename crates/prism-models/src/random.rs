//! Models with random weights, for measurements that need no trained ones.

use burn::tensor::{DType, Device, Distribution, Tensor};

use crate::config::ModelConfig;
use crate::llama::Llama;
use crate::load::check_compute_type;
use crate::model_error::ModelError;

/// Standard deviation of the weights, as models begin their training with.
const DEVIATION: f64 = 0.02;

impl Llama {
    /// A model of `config` in `dtype` on `device` whose norms do nothing and whose other weights are normal
    /// with a deviation of 0.02, the same for the same seed. They are made on the device.
    ///
    /// # Errors
    /// A type other than F32, F16 and BF16, or that the device lacks.
    pub fn random(
        config: ModelConfig,
        dtype: DType,
        device: &Device,
        seed: u64,
    ) -> Result<Self, ModelError> {
        check_compute_type(dtype, device)?;
        device.seed(seed);
        Self::assemble(config, &mut |name, shape| {
            let len = [shape.iter().product::<usize>()];
            if name.ends_with("norm.weight") {
                return Ok(Tensor::ones(len, (device, dtype)));
            }
            let normal = Distribution::Normal(0.0, DEVIATION);
            Ok(Tensor::random(len, normal, (device, dtype)))
        })
    }
}
