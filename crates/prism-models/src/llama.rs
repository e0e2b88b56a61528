//! Llama and its kin (Mistral, Qwen 2 and 3): decoder-only transformer with RMSNorm, RoPE,
//! grouped-query attention and SwiGLU.

use std::borrow::Cow;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_nn::RmsNorm;
use burn_prism::{AttentionOptions, PrismAttention, PrismCache, PrismConfig};
use prism_core::AttentionShape;

use crate::config::ModelConfig;
use crate::mlp::Mlp;
use crate::model_error::ModelError;
use crate::rope::Rotation;
use crate::rows;
use crate::self_attention::{LayerTrace, SelfAttention};

/// One decoder layer.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    pub(crate) input_norm: RmsNorm,
    pub(crate) attention: SelfAttention,
    pub(crate) post_norm: RmsNorm,
    pub(crate) mlp: Mlp,
}

/// A Llama model.
#[derive(Module, Debug)]
pub struct Llama {
    /// `[vocab, hidden]`.
    pub(crate) embedding: Param<Tensor<2>>,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: RmsNorm,
    /// `[vocab, hidden]`; the embedding where `None`.
    pub(crate) head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    pub(crate) config: ModelConfig,
    /// Inverse frequency of each rotary pair.
    #[module(skip)]
    pub(crate) inv_freq: Vec<f64>,
    /// Whether caches beyond the original context have inverse frequencies of their own.
    #[module(skip)]
    pub(crate) dynamic: bool,
}

/// Caches of all layers.
#[derive(Debug, Clone)]
pub struct LlamaCache {
    layers: Vec<PrismCache>,
}

impl LlamaCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, PrismCache::len)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions it can hold.
    pub fn capacity(&self) -> usize {
        self.layers.first().map_or(0, PrismCache::capacity)
    }

    /// Forgets everything, keeps the memory.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(PrismCache::reset);
    }

    /// Keeps the first `len` positions, for another continuation of the same text.
    ///
    /// # Errors
    /// More positions than are held.
    pub fn truncate(&mut self, len: usize) -> Result<(), ModelError> {
        self.layers.iter_mut().try_for_each(|layer| layer.truncate(len))?;
        Ok(())
    }
}

impl Llama {
    /// Sizes and settings.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Prism settings that fit this model: its RoPE, and the paper's defaults.
    pub fn prism_config(&self) -> PrismConfig {
        PrismConfig::new(self.config.rope)
    }

    /// Lets every layer attend with Prism, or exactly where `None`.
    ///
    /// # Errors
    /// Settings that don't fit the heads.
    pub fn set_attention(&mut self, prism: Option<&PrismConfig>) -> Result<(), ModelError> {
        for layer in 0..self.layers.len() {
            self.set_layer_attention(layer, prism)?;
        }
        Ok(())
    }

    /// Lets one layer attend with Prism, or exactly where `None`.
    ///
    /// # Errors
    /// A layer past the last, or settings that don't fit the heads.
    pub fn set_layer_attention(
        &mut self,
        layer: usize,
        prism: Option<&PrismConfig>,
    ) -> Result<(), ModelError> {
        if let Some(config) = prism {
            config.validate(self.config.head_dim)?;
        }
        let layers = self.layers.len();
        let got = self.layers.get_mut(layer).ok_or(ModelError::NoSuchLayer { layer, layers })?;
        got.attention.set_prism(prism.map(|config| PrismAttention::new(config.clone())));
        Ok(())
    }

    /// Replaces the inverse frequencies of the rotary pairs, which otherwise follow from the
    /// settings: for checkpoints that were trained or evaluated with others.
    ///
    /// # Errors
    /// Another number of pairs than the heads have.
    pub fn set_inv_freq(&mut self, inv_freq: Vec<f64>) -> Result<(), ModelError> {
        if inv_freq.len() != self.inv_freq.len() {
            let (pairs, got) = (self.inv_freq.len(), inv_freq.len());
            return Err(ModelError::RotaryPairs { pairs, got });
        }
        (self.inv_freq, self.dynamic) = (inv_freq, false);
        Ok(())
    }

    /// Inverse frequency of each rotary pair, radians a position; under dynamic scaling those of
    /// sequences within the original context.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Inverse frequencies for all positions of a cache. Under dynamic scaling they depend on the
    /// length of the sequence, and the keys in the cache stay rotated as they were: its capacity
    /// therefore decides, which holds from the first token to the last.
    fn inv_freq_in(&self, cache: &LlamaCache) -> Result<Cow<'_, [f64]>, ModelError> {
        if !self.dynamic {
            return Ok(Cow::Borrowed(&self.inv_freq));
        }
        let rope = self.config.rope.for_length(cache.capacity());
        Ok(Cow::Owned(rope.inv_freq(self.config.head_dim)?))
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.embedding.val().device()
    }

    /// The element type of the weights.
    pub fn dtype(&self) -> DType {
        self.embedding.val().dtype()
    }

    /// An empty cache for one sequence of `capacity` tokens and Prism blocks of `block`.
    ///
    /// # Errors
    /// A capacity or block size of 0.
    pub fn cache(&self, capacity: usize, block: usize) -> Result<LlamaCache, ModelError> {
        let kv = [1, self.config.kv_heads, capacity, self.config.head_dim];
        let q = [1, self.config.q_heads, capacity, self.config.head_dim];
        let shape = AttentionShape::new(q, kv, kv)?;
        let (dtype, device) = (self.dtype(), self.device());
        let layers = (0..self.layers.len())
            .map(|_| PrismCache::new(&shape, capacity, block, dtype, &device))
            .collect::<Result<_, _>>()?;
        Ok(LlamaCache { layers })
    }

    /// Runs the tokens that follow those in the cache and returns their final hidden states
    /// `[1, n, hidden]`. `trace` hears from every layer as it ends, and makes attention be timed.
    ///
    /// # Errors
    /// No tokens, ids past the vocabulary, more than the cache has room for: the cache is unchanged
    /// then. A cache made for blocks of another size than a layer's: reset it then.
    pub fn hidden(
        &self,
        ids: &[u32],
        cache: &mut LlamaCache,
        options: &AttentionOptions,
        mut trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Tensor<3>, ModelError> {
        let n = ids.len();
        self.check(ids, cache)?;
        let device = self.device();
        let tokens: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let tokens =
            Tensor::<1, Int>::from_data(TensorData::new(tokens, [n]), (&device, DType::I32));
        let rotation = Rotation::new(
            &self.inv_freq_in(cache)?,
            self.config.rope.attention_factor(),
            cache.len(),
            n,
            (self.dtype(), &device),
        );
        let x = self.embedding.val().select(0, tokens).unsqueeze_dim::<3>(0);
        let runs = rows::runs(n, &device);
        let rotations: Vec<Rotation> = runs.iter().map(|run| rotation.part(run.clone())).collect();
        let mut x: Vec<Tensor<3>> =
            runs.iter().map(|run| x.clone().slice_dim(1, run.clone())).collect();
        for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let projected = rows::map(x.iter().zip(&rotations).collect(), |(x, rotation)| {
                layer.attention.project(layer.input_norm.forward(x.clone()), rotation)
            });
            let projected = projected.into_iter().collect::<Result<_, _>>()?;
            let timed = trace.is_some();
            let (attended, report, seconds) =
                layer.attention.attend(join(projected), cache, options, timed)?;
            let added = rows::map(x.into_iter().zip(&runs).collect(), |(x, run)| {
                let x = layer.attention.output(attended.clone().slice_dim(2, run.clone()), x)?;
                layer.mlp.forward(layer.post_norm.forward(x.clone()), x)
            });
            x = added.into_iter().collect::<Result<_, _>>()?;
            if let Some(trace) = &mut trace {
                trace(LayerTrace { layer: index, report, seconds });
            }
        }
        Ok(Tensor::cat(x, 1))
    }

    /// Logits `[n, vocab]` of hidden states `[1, n, hidden]`.
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<2> {
        let head = self.head.as_ref().unwrap_or(&self.embedding).val();
        self.norm.forward(hidden).squeeze_dim::<2>(0).matmul(head.transpose())
    }

    /// Runs the tokens that follow those in the cache and returns the logits `[vocab]` of the last
    /// position, in f32 on the host.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden), or the device failed.
    pub fn next_logits(
        &self,
        ids: &[u32],
        cache: &mut LlamaCache,
        options: &AttentionOptions,
        trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Vec<f32>, ModelError> {
        let hidden = self.hidden(ids, cache, options, trace)?;
        self.last_logits(&hidden)
    }

    /// Logits `[vocab]` of the last of hidden states `[1, n, hidden]`, in f32 on the host.
    ///
    /// # Errors
    /// The device failed.
    pub fn last_logits(&self, hidden: &Tensor<3>) -> Result<Vec<f32>, ModelError> {
        let [_, n, width] = hidden.dims();
        let last = hidden.clone().slice([0..1, n - 1..n, 0..width]);
        crate::model_error::read_f32(self.logits(last))
    }

    fn check(&self, ids: &[u32], cache: &LlamaCache) -> Result<(), ModelError> {
        if ids.is_empty() {
            return Err(ModelError::NoTokens);
        }
        let vocab = self.config.vocab_size;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(ModelError::TokenId { id, vocab });
        }
        if cache.layers.len() != self.layers.len() {
            let (layers, got) = (self.layers.len(), cache.layers.len());
            return Err(ModelError::CacheLayers { layers, got });
        }
        let free = cache.capacity() - cache.len();
        if ids.len() > free {
            return Err(ModelError::CacheFull { tokens: ids.len(), free });
        }
        Ok(())
    }
}

/// Queries, keys and values of consecutive rows, each joined along the rows.
fn join(parts: Vec<[Tensor<4>; 3]>) -> [Tensor<4>; 3] {
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for [q_part, k_part, v_part] in parts {
        q.push(q_part);
        k.push(k_part);
        v.push(v_part);
    }
    [q, k, v].map(|parts| Tensor::cat(parts, 2))
}
