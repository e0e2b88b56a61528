//! From checkpoint to model.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_nn::{Linear, RmsNorm};
use burn_prism::GateUp;

use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::llama::{DecoderLayer, Llama};
use crate::mlp::Mlp;
use crate::model_error::ModelError;
use crate::self_attention::SelfAttention;

impl Llama {
    /// Loads the weights of a checkpoint in `dtype` on `device`; `progress` hears of
    /// `(tensors done, tensors in all)`.
    ///
    /// # Errors
    /// Tensors that are missing, left over, of another shape, unreadable or not finite; biases or
    /// norms that this model doesn't have.
    pub fn load(
        checkpoint: &Checkpoint,
        dtype: DType,
        device: &Device,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let audit = checkpoint.audit();
        if let Some(name) = audit.missing.first() {
            return Err(LoadError::MissingTensor { name: name.clone() }.into());
        }
        if !audit.unexpected.is_empty() {
            return Err(ModelError::UnexpectedTensors { names: audit.unexpected });
        }
        let config = checkpoint.config().clone();
        let inv_freq = config.rope.inv_freq(config.head_dim)?;
        let total = checkpoint.expected_tensors().len();
        let mut loader = Loader { checkpoint, dtype, device, progress, done: 0, total };
        let (hidden, d) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.q_heads * d, config.kv_heads * d);
        let eps = config.rms_eps;
        let embedding = loader.param("model.embed_tokens.weight", [config.vocab_size, hidden])?;
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let mut linear = |part: &str, rows, columns| loader.linear(&name(part), rows, columns);
            let attention = SelfAttention::new(
                linear("self_attn.q_proj", q, hidden)?,
                linear("self_attn.k_proj", kv, hidden)?,
                linear("self_attn.v_proj", kv, hidden)?,
                linear("self_attn.o_proj", hidden, q)?,
                d,
            );
            let mut weight =
                |part: &str| loader.weight(&name(part), config.intermediate_size, hidden);
            let gate_up = GateUp::new(weight("mlp.gate_proj")?, weight("mlp.up_proj")?)?;
            let down = loader.linear(&name("mlp.down_proj"), hidden, config.intermediate_size)?;
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
        Ok(Self { embedding, layers, norm, head, config, inv_freq })
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: DType,
    device: &'a Device,
    progress: &'a mut dyn FnMut(usize, usize),
    done: usize,
    total: usize,
}

impl Loader<'_> {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, LoadError> {
        let values = self.checkpoint.finite_f32_tensor(name, &shape)?;
        self.done += 1;
        (self.progress)(self.done, self.total);
        Ok(Tensor::from_data(TensorData::new(values, shape), (self.device, self.dtype)))
    }

    fn param<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Param<Tensor<D>>, LoadError> {
        Ok(Param::from_tensor(self.tensor(name, shape)?))
    }

    /// Checkpoints hold `[out, in]`, Burn multiplies by `[in, out]`: a transposed view serves.
    fn weight(&mut self, name: &str, rows: usize, columns: usize) -> Result<Tensor<2>, LoadError> {
        Ok(self.tensor(name, [rows, columns])?.transpose())
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize) -> Result<Linear, LoadError> {
        let weight = self.weight(name, rows, columns)?;
        Ok(Linear { weight: Param::from_tensor(weight), bias: None })
    }

    fn norm(&mut self, name: &str, width: usize, epsilon: f64) -> Result<RmsNorm, LoadError> {
        Ok(RmsNorm { gamma: self.param(name, [width])?, epsilon })
    }
}
