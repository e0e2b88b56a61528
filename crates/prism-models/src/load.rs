//! From checkpoint to model.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_nn::{Linear, RmsNorm};
use burn_prism::GateUp;
use prism_core::RopeScaling;

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::llama::{DecoderLayer, Llama};
use crate::mlp::Mlp;
use crate::model_error::ModelError;
use crate::self_attention::SelfAttention;

/// Where weights come from: of a name and a shape the elements, flat.
pub(crate) type Weights<'a> = &'a mut dyn FnMut(&str, &[usize]) -> Result<Tensor<1>, ModelError>;

impl Llama {
    /// Loads the weights of a checkpoint in `dtype` on `device`; `progress` hears of
    /// `(tensors done, tensors in all)`.
    ///
    /// # Errors
    /// A type other than F32, F16 and BF16, or that the device lacks. Tensors that are missing, left
    /// over or of another shape, before any is read; then those that are unreadable, not finite or
    /// too large for the type.
    pub fn load(
        checkpoint: &Checkpoint,
        dtype: DType,
        device: &Device,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        check_compute_type(dtype, device)?;
        let expected = checkpoint.expected_tensors();
        for (name, shape) in &expected {
            checkpoint.check_shape(name, shape)?;
        }
        let audit = checkpoint.audit();
        if !audit.unexpected.is_empty() {
            return Err(ModelError::UnexpectedTensors { names: audit.unexpected });
        }
        let (mut done, total) = (0, expected.len());
        Self::assemble(checkpoint.config().clone(), &mut |name, shape| {
            let data = checkpoint.finite_data(name, shape, dtype)?;
            done += 1;
            progress(done, total);
            let (bytes, _, dtype) = data.into_parts();
            let data = TensorData::from_bytes(bytes, [shape.iter().product::<usize>()], dtype);
            Ok(Tensor::from_data(data, (device, dtype)))
        })
    }

    /// The model of a config from its tensors.
    pub(crate) fn assemble(config: ModelConfig, tensor: Weights) -> Result<Self, ModelError> {
        let inv_freq = config.rope.inv_freq(config.head_dim)?;
        let mut loader = Loader { tensor };
        let (hidden, d) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.q_heads * d, config.kv_heads * d);
        let eps = config.rms_eps;
        let embedding = loader.param("model.embed_tokens.weight", [config.vocab_size, hidden])?;
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let layer = format!("model.layers.{layer}");
            let name = |part: &str| format!("{layer}.{part}.weight");
            let mut linear = |part: &str, rows, columns, biased| {
                loader.linear(&format!("{layer}.self_attn.{part}"), [rows, columns], biased)
            };
            let mut attention = SelfAttention::new(
                linear("q_proj", q, hidden, config.qkv_bias)?,
                linear("k_proj", kv, hidden, config.qkv_bias)?,
                linear("v_proj", kv, hidden, config.qkv_bias)?,
                linear("o_proj", hidden, q, config.output_bias)?,
                d,
            );
            if config.qk_norm {
                let q_norm = loader.norm(&name("self_attn.q_norm"), d, eps)?;
                let k_norm = loader.norm(&name("self_attn.k_norm"), d, eps)?;
                attention = attention.with_norms(q_norm, k_norm);
            }
            let mut weight =
                |part: &str| loader.weight(&name(part), config.intermediate_size, hidden);
            let gate_up = GateUp::new(weight("mlp.gate_proj")?, weight("mlp.up_proj")?)?;
            let down = format!("{layer}.mlp.down_proj");
            let down = loader.linear(&down, [hidden, config.intermediate_size], false)?;
            let mlp = Mlp::new(gate_up, down);
            layers.push(DecoderLayer {
                input_norm: loader.norm(&name("input_layernorm"), hidden, eps)?,
                attention,
                post_norm: loader.norm(&name("post_attention_layernorm"), hidden, eps)?,
                mlp,
            });
        }
        let norm = loader.norm("model.norm.weight", hidden, eps)?;
        let head = if config.tie_embeddings {
            None
        } else {
            Some(loader.param("lm_head.weight", [config.vocab_size, hidden])?)
        };
        let dynamic = matches!(config.rope.scaling, RopeScaling::Dynamic { .. });
        Ok(Self { embedding, layers, norm, head, config, inv_freq, dynamic })
    }
}

/// Whether a device computes in a type.
pub(crate) fn check_compute_type(dtype: DType, device: &Device) -> Result<(), ModelError> {
    let compute = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if compute && device.supports_dtype(dtype) {
        return Ok(());
    }
    Err(ModelError::ComputeType { dtype, device: format!("{device:?}") })
}

struct Loader<'a> {
    tensor: Weights<'a>,
}

impl Loader<'_> {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, ModelError> {
        Ok((self.tensor)(name, &shape)?.reshape(shape))
    }

    fn param<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Param<Tensor<D>>, ModelError> {
        Ok(Param::from_tensor(self.tensor(name, shape)?))
    }

    /// Checkpoints hold `[out, in]`, Burn multiplies by `[in, out]`: a transposed view serves.
    fn weight(&mut self, name: &str, rows: usize, columns: usize) -> Result<Tensor<2>, ModelError> {
        Ok(self.tensor(name, [rows, columns])?.transpose())
    }

    fn linear(
        &mut self,
        name: &str,
        [rows, columns]: [usize; 2],
        biased: bool,
    ) -> Result<Linear, ModelError> {
        let weight = self.weight(&format!("{name}.weight"), rows, columns)?;
        let bias = if biased { Some(self.param(&format!("{name}.bias"), [rows])?) } else { None };
        Ok(Linear { weight: Param::from_tensor(weight), bias })
    }

    fn norm(&mut self, name: &str, width: usize, epsilon: f64) -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm { gamma: self.param(name, [width])?, epsilon })
    }
}
