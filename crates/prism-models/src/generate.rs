//! Prefill, then one token at a time.

use burn_prism::AttentionOptions;

use crate::llama::{Llama, LlamaCache};
use crate::model_error::ModelError;
use crate::sample::Sampler;
use crate::self_attention::LayerTrace;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model chose this token, which ends a text.
    EndToken(u32),
    /// As many tokens as were asked for.
    Limit,
    /// The cache has no room for the last token.
    CacheFull,
    /// Who heard the last token wanted no more.
    Stopped,
}

/// Generated tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The tokens, without the one that ends the text.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
}

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

    /// Continues from `logits` until a token that ends a text by the model's configuration, `limit`
    /// tokens or a full cache; `visit` gets each token and says whether to go on. Decoding reads
    /// every key.
    ///
    /// # Errors
    /// Logits that can't be sampled, or as [`hidden`](Self::hidden).
    pub fn generate(
        &self,
        logits: Vec<f32>,
        limit: usize,
        sampler: &mut Sampler,
        cache: &mut LlamaCache,
        visit: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Vec<u32>, ModelError> {
        let end = &self.config().eos_ids;
        Ok(self.generate_until(logits, limit, end, sampler, cache, visit)?.tokens)
    }

    /// As [`generate`](Self::generate), until one of the tokens `end`. The cache holds all tokens
    /// but the last one then; where the text ended by itself, all.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_until(
        &self,
        mut logits: Vec<f32>,
        limit: usize,
        end: &[u32],
        sampler: &mut Sampler,
        cache: &mut LlamaCache,
        visit: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generated, ModelError> {
        let mut tokens = Vec::new();
        let finish = loop {
            if tokens.len() >= limit {
                break Finish::Limit;
            }
            let token = sampler.sample(&logits)?;
            if end.contains(&token) {
                break Finish::EndToken(token);
            }
            tokens.push(token);
            if !visit(token) {
                break Finish::Stopped;
            }
            if tokens.len() == limit {
                break Finish::Limit;
            }
            if cache.len() == cache.capacity() {
                break Finish::CacheFull;
            }
            logits = self.next_logits(&[token], cache, &AttentionOptions::default(), None)?;
        };
        Ok(Generated { tokens, finish })
    }
}
