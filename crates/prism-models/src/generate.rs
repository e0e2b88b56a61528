//! Prefill, then one token at a time.

use burn_prism::AttentionOptions;

use crate::llama::{Llama, LlamaCache};
use crate::model_error::ModelError;
use crate::sample::Sampler;
use crate::self_attention::LayerTrace;

impl Llama {
    /// Runs a prompt through the model in chunks of `chunk` tokens (whole where `None`) and returns
    /// the logits `[vocab]` that follow it.
    ///
    /// Chunks that are multiples of the block size, with causal calibration, select what the whole
    /// prompt selects.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden), or a chunk of 0.
    pub fn prefill(
        &self,
        ids: &[u32],
        chunk: Option<usize>,
        cache: &mut LlamaCache,
        mut trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Vec<f32>, ModelError> {
        let chunk = chunk.unwrap_or(ids.len().max(1));
        if chunk == 0 {
            return Err(ModelError::ChunkSize);
        }
        let free = cache.capacity() - cache.len();
        if ids.len() > free {
            return Err(ModelError::CacheFull { tokens: ids.len(), free });
        }
        let mut logits = Err(ModelError::NoTokens);
        for (i, part) in ids.chunks(chunk).enumerate() {
            let more_follows = (i + 1) * chunk < ids.len();
            let options = AttentionOptions::default().with_more_follows(more_follows);
            let trace: Option<&mut dyn FnMut(LayerTrace)> = match &mut trace {
                Some(trace) => Some(*trace),
                None => None,
            };
            let hidden = self.hidden(part, cache, &options, trace)?;
            if !more_follows {
                logits = self.last_logits(&hidden);
            }
        }
        logits
    }

    /// Continues from `logits` until `eos`, `limit` tokens or a full cache; `visit` gets each
    /// token and says whether to go on. Decoding reads every key.
    ///
    /// # Errors
    /// Logits that can't be sampled, or as [`hidden`](Self::hidden).
    pub fn generate(
        &self,
        mut logits: Vec<f32>,
        limit: usize,
        sampler: &mut Sampler,
        cache: &mut LlamaCache,
        visit: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Vec<u32>, ModelError> {
        let mut tokens = Vec::new();
        while tokens.len() < limit {
            let token = sampler.sample(&logits)?;
            if self.config().eos_ids.contains(&token) {
                break;
            }
            tokens.push(token);
            if !visit(token) || tokens.len() == limit || cache.len() == cache.capacity() {
                break;
            }
            logits = self.next_logits(&[token], cache, &AttentionOptions::default(), None)?;
        }
        Ok(tokens)
    }
}
