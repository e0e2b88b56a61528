//! A conversation on one cache: of each prompt only what the cache doesn't hold yet is run.

use crate::generate::Generated;
use crate::llama::{Llama, LlamaCache};
use crate::model_error::ModelError;
use crate::sample::Sampler;
use crate::self_attention::LayerTrace;

/// A cache that knows the tokens it holds.
#[derive(Debug, Clone)]
pub struct Session {
    cache: LlamaCache,
    tokens: Vec<u32>,
}

/// What a prompt took.
#[derive(Debug, Clone)]
pub struct Prompted {
    /// Logits `[vocab]` that follow the prompt.
    pub logits: Vec<f32>,
    /// Leading tokens that the cache held already.
    pub reused: usize,
}

impl Session {
    /// An empty session; forgets what the cache holds.
    pub fn new(mut cache: LlamaCache) -> Self {
        cache.reset();
        Self { cache, tokens: Vec::new() }
    }

    /// The tokens that the cache holds.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that the cache can hold.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Forgets everything, keeps the memory.
    pub fn reset(&mut self) {
        self.cache.reset();
        self.tokens.clear();
    }

    /// Leading tokens of `ids` that [`prefill`](Self::prefill) would not run again: as many as the
    /// cache holds, but for the last one, whose logits are wanted.
    pub fn reusable(&self, ids: &[u32]) -> usize {
        let common = self.tokens.iter().zip(ids).take_while(|(held, id)| held == id).count();
        common.min(ids.len().saturating_sub(1))
    }

    /// Makes the cache hold the whole prompt `ids`. Tokens that it holds from the start of the
    /// prompt on are kept, later ones forgotten, and the rest is run, `chunk` tokens at a time.
    ///
    /// # Errors
    /// As [`Llama::prefill`]. With a prompt that is longer than the cache nothing has changed;
    /// after any other error the session is empty.
    pub fn prefill(
        &mut self,
        llama: &Llama,
        ids: &[u32],
        chunk: Option<usize>,
        trace: Option<&mut dyn FnMut(LayerTrace)>,
    ) -> Result<Prompted, ModelError> {
        let reused = self.reusable(ids);
        let (tokens, free) = (ids.len() - reused, self.capacity() - reused);
        if tokens > free {
            return Err(ModelError::CacheFull { tokens, free });
        }
        let result = (self.keep(reused))
            .and_then(|()| llama.prefill(&ids[reused..], chunk, &mut self.cache, trace));
        match result {
            Ok(logits) => {
                self.tokens.truncate(reused);
                self.tokens.extend_from_slice(&ids[reused..]);
                Ok(Prompted { logits, reused })
            }
            Err(error) => {
                self.reset();
                Err(error)
            }
        }
    }

    /// Rolls the cache back, unless it needn't be: calibration starts anew then.
    fn keep(&mut self, len: usize) -> Result<(), ModelError> {
        if len == self.cache.len() { Ok(()) } else { self.cache.truncate(len) }
    }

    /// Continues from `logits` as [`Llama::generate_until`] does.
    ///
    /// # Errors
    /// As [`Llama::generate_until`]; the session is empty then.
    pub fn generate(
        &mut self,
        llama: &Llama,
        logits: Vec<f32>,
        limit: usize,
        end: &[u32],
        sampler: &mut Sampler,
        visit: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generated, ModelError> {
        match llama.generate_until(logits, limit, end, sampler, &mut self.cache, visit) {
            Ok(generated) => {
                let run = self.cache.len() - self.tokens.len();
                self.tokens.extend_from_slice(&generated.tokens[..run]);
                Ok(generated)
            }
            Err(error) => {
                self.reset();
                Err(error)
            }
        }
    }
}
