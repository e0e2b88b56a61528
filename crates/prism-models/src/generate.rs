//! Prefill, then one token at a time.

use burn_prism::AttentionOptions;

use crate::batch::Sequence;
use crate::forward::single;
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
        trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Vec<f32>, ModelError> {
        self.check(ids, cache)?;
        let mut trace = trace.map(single);
        let trace = trace.as_mut().map(|trace| trace as _);
        let mut logits = self.prefill_all(&[ids], chunk, std::slice::from_mut(cache), trace)?;
        logits.pop().ok_or(ModelError::NoTokens)
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
        logits: Vec<f32>,
        limit: usize,
        end: &[u32],
        sampler: &mut Sampler,
        cache: &mut LlamaCache,
        visit: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generated, ModelError> {
        let mut visit = |_, token| visit(token);
        let (samplers, caches) = (std::slice::from_mut(sampler), std::slice::from_mut(cache));
        let mut all = self.continue_all(vec![logits], limit, end, samplers, caches, &mut visit)?;
        all.pop().ok_or(ModelError::NoTokens)
    }

    /// [`generate_until`](Self::generate_until) for the prompts of a batch: each from its own logits,
    /// with its own sampler and on its own cache, until it ends by itself. `visit` also gets the
    /// prompt's index. Prompts that go on share each pass through the layers.
    ///
    /// # Errors
    /// As [`generate_until`](Self::generate_until), or another number of samplers or caches than
    /// logits.
    pub fn batch_generate(
        &self,
        logits: Vec<Vec<f32>>,
        limit: usize,
        end: &[u32],
        samplers: &mut [Sampler],
        caches: &mut [LlamaCache],
        visit: &mut dyn FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Generated>, ModelError> {
        let prompts = logits.len();
        for (what, got) in [("samplers", samplers.len()), ("caches", caches.len())] {
            if got != prompts {
                return Err(ModelError::BatchSize { what, prompts, got });
            }
        }
        self.continue_all(logits, limit, end, samplers, caches, visit)
    }

    fn continue_all(
        &self,
        mut logits: Vec<Vec<f32>>,
        limit: usize,
        end: &[u32],
        samplers: &mut [Sampler],
        caches: &mut [LlamaCache],
        visit: &mut dyn FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Generated>, ModelError> {
        let goes_on = Generated { tokens: Vec::new(), finish: Finish::Limit };
        let mut all = vec![goes_on; logits.len()];
        let mut running: Vec<usize> = (0..logits.len()).filter(|_| limit > 0).collect();
        while !running.is_empty() {
            let mut chosen = vec![None; all.len()];
            for &prompt in &running {
                let Generated { tokens, finish } = &mut all[prompt];
                let token = samplers[prompt].sample(&logits[prompt])?;
                if end.contains(&token) {
                    *finish = Finish::EndToken(token);
                    continue;
                }
                tokens.push(token);
                let cache = &caches[prompt];
                if !visit(prompt, token) {
                    *finish = Finish::Stopped;
                } else if tokens.len() == limit {
                    *finish = Finish::Limit;
                } else if cache.len() == cache.capacity() {
                    *finish = Finish::CacheFull;
                } else {
                    self.check(&[token], cache)?;
                    chosen[prompt] = Some([token]);
                }
            }
            running.retain(|&prompt| chosen[prompt].is_some());
            let sequences = chosen.iter().zip(caches.iter_mut()).enumerate();
            let sequences: Vec<_> = sequences
                .filter_map(|(prompt, (token, cache))| {
                    let (ids, options) = (token.as_ref()?, AttentionOptions::default());
                    Some(Sequence { prompt, ids, cache, options })
                })
                .collect();
            if sequences.is_empty() {
                break;
            }
            let rows: Vec<usize> = (0..sequences.len()).collect();
            let next = self.pass(sequences, None)?;
            for (&prompt, next) in running.iter().zip(self.logits_at(&next, &rows)?) {
                logits[prompt] = next;
            }
        }
        Ok(all)
    }
}
