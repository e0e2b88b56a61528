//! Llama and its kin (Mistral, Qwen 2 and 3): decoder-only transformer with RMSNorm, RoPE,
//! grouped-query attention and SwiGLU.

use std::borrow::Cow;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};
use burn_nn::RmsNorm;
use burn_prism::{AttentionOptions, PrismAttention, PrismCache, PrismConfig, RotaryTable};
use prism_core::AttentionShape;

use crate::config::ModelConfig;
use crate::mlp::Mlp;
use crate::model_error::ModelError;
use crate::policy::AttentionPolicy;
use crate::presets;
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
    pub(crate) layers: Vec<PrismCache>,
    /// Angles of all its positions and the inverse frequencies they come from, where attention rotates.
    pub(crate) angles: Option<(Vec<f64>, RotaryTable)>,
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

    /// Prism settings that fit this model: [`presets::recommended`].
    pub fn prism_config(&self) -> PrismConfig {
        presets::recommended(&self.config)
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
            config.validate_for(self.config.q_heads, self.config.head_dim)?;
        }
        let layers = self.layers.len();
        let got = self.layers.get_mut(layer).ok_or(ModelError::NoSuchLayer { layer, layers })?;
        got.attention.set_prism(prism.map(|config| PrismAttention::new(config.clone())));
        Ok(())
    }

    /// Lets every layer attend as a policy says. Its block size is that of [`Llama::cache`].
    ///
    /// # Errors
    /// A policy that doesn't fit the model; nothing has changed then.
    pub fn set_policy(&mut self, policy: &AttentionPolicy) -> Result<(), ModelError> {
        let configs = policy.resolve(&self.config)?;
        for (layer, config) in configs.iter().enumerate() {
            self.set_layer_attention(layer, config.as_ref())?;
        }
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
    pub(crate) fn inv_freq_in(&self, cache: &LlamaCache) -> Result<Cow<'_, [f64]>, ModelError> {
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
        Ok(LlamaCache { layers, angles: None })
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

    pub(crate) fn check(&self, ids: &[u32], cache: &LlamaCache) -> Result<(), ModelError> {
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
