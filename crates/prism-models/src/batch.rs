//! Prompts of different lengths, run together.
//!
//! They lie end to end, without padding: what is done token by token takes the tokens of all prompts
//! at once and reads the weights once, and attention takes each prompt by itself, over a cache of its
//! own. So each is chunked, selected and calibrated as it would be alone, and none pays for the
//! length of another.

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_prism::{AttentionOptions, Report};
use thiserror::Error;

use crate::llama::{Llama, LlamaCache};
use crate::model_error::{ModelError, read_f32};
use crate::perplexity::Predictions;
use crate::stopwatch::PartSeconds;

/// Prompts of at least one token each, end to end.
///
/// ```
/// use prism_models::Batch;
///
/// // The same two prompts, whichever way they come.
/// let batch = Batch::new(&[vec![5, 6, 7], vec![8]])?;
/// assert_eq!(batch, Batch::packed(vec![5, 6, 7, 8], &[0, 3, 4])?);
/// assert_eq!(batch, Batch::padded(&[5, 6, 7, 8, 0, 0], 3, &[3, 1])?);
/// let mask = [true, true, true, false, false, true];
/// assert_eq!(batch, Batch::masked(&[5, 6, 7, 0, 0, 8], 3, &mask)?);
/// # Ok::<(), prism_models::batch::BatchError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    ids: Vec<u32>,
    /// Where each prompt begins, and where the last one ends.
    offsets: Vec<usize>,
}

/// Why prompts are no batch.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BatchError {
    /// No prompts.
    #[error("a batch must hold at least 1 prompt, got 0")]
    NoPrompts,
    /// A prompt of no tokens.
    #[error("prompt {prompt} must hold at least 1 token, got 0")]
    EmptyPrompt {
        /// Which one.
        prompt: usize,
    },
    /// Offsets that don't begin with the first token.
    #[error("the first offset must be 0, got {got}")]
    FirstOffset {
        /// The offset.
        got: usize,
    },
    /// Offsets that go back.
    #[error("offsets must not decrease, but offset {index} is {got} after {before}")]
    DecreasingOffset {
        /// Which one.
        index: usize,
        /// The offset.
        got: usize,
        /// The one before.
        before: usize,
    },
    /// Offsets that don't end with the last token.
    #[error("the last offset must be the number of tokens, {tokens}, got {got}")]
    LastOffset {
        /// Tokens.
        tokens: usize,
        /// The offset.
        got: usize,
    },
    /// Padded ids that are no rows of the width.
    #[error(
        "{prompts} prompts of width {width} must have as many {what} as both multiplied, got {got}"
    )]
    Size {
        /// Prompts.
        prompts: usize,
        /// Tokens a padded prompt.
        width: usize,
        /// Ids, or entries of the mask.
        what: &'static str,
        /// Their number.
        got: usize,
    },
    /// A prompt that is longer than it was padded to.
    #[error("prompt {prompt} must have at most the width of {width} tokens, got {got}")]
    Length {
        /// Which one.
        prompt: usize,
        /// Tokens a padded prompt.
        width: usize,
        /// Its length.
        got: usize,
    },
    /// Padding inside of a prompt.
    #[error("the mask of prompt {prompt} has a hole at {at}: padding must be left or right of it")]
    Hole {
        /// Which one.
        prompt: usize,
        /// The first masked position between two tokens.
        at: usize,
    },
}

impl Batch {
    /// Of prompts one by one.
    ///
    /// # Errors
    /// No prompts, or one without tokens.
    pub fn new<P: AsRef<[u32]>>(prompts: &[P]) -> Result<Self, BatchError> {
        let mut ids = Vec::new();
        let mut offsets = vec![0];
        for prompt in prompts {
            ids.extend_from_slice(prompt.as_ref());
            offsets.push(ids.len());
        }
        Self::packed(ids, &offsets)
    }

    /// Of ids end to end and cumulative lengths `[0, a, a + b, …]`, as variable-length kernels take
    /// them (`cu_seqlens`).
    ///
    /// # Errors
    /// Offsets that don't begin with 0, decrease, or don't end with the number of ids; no prompts, or
    /// one without tokens.
    pub fn packed(ids: Vec<u32>, offsets: &[usize]) -> Result<Self, BatchError> {
        let (&[got, .., last] | &[got @ last]) = offsets else { return Err(BatchError::NoPrompts) };
        if got != 0 {
            return Err(BatchError::FirstOffset { got });
        }
        for (index, pair) in offsets.windows(2).enumerate() {
            let &[before, got] = pair else { continue };
            if got < before {
                return Err(BatchError::DecreasingOffset { index: index + 1, got, before });
            }
            if got == before {
                return Err(BatchError::EmptyPrompt { prompt: index });
            }
        }
        if offsets.len() == 1 {
            return Err(BatchError::NoPrompts);
        }
        if last != ids.len() {
            return Err(BatchError::LastOffset { tokens: ids.len(), got: last });
        }
        Ok(Self { ids, offsets: offsets.to_vec() })
    }

    /// Of right-padded ids `[prompts, width]`, row after row, and the length of each prompt. What
    /// lies behind a prompt is not read.
    ///
    /// # Errors
    /// Another number of ids, a length above the width, no prompts, or one without tokens.
    pub fn padded(ids: &[u32], width: usize, lengths: &[usize]) -> Result<Self, BatchError> {
        sized("ids", ids.len(), width, lengths.len())?;
        let mut prompts = Vec::with_capacity(lengths.len());
        for (prompt, &got) in lengths.iter().enumerate() {
            let row = &ids[prompt * width..][..width];
            prompts.push(row.get(..got).ok_or(BatchError::Length { prompt, width, got })?);
        }
        Self::new(&prompts)
    }

    /// Of ids `[prompts, width]` padded left or right, and an attention mask of their shape that says
    /// which are tokens. What it leaves out is not read, and a prompt's first token has position 0.
    ///
    /// # Errors
    /// Ids or a mask that aren't rows of the width, padding between tokens, no prompts, or one
    /// without tokens.
    pub fn masked(ids: &[u32], width: usize, mask: &[bool]) -> Result<Self, BatchError> {
        let prompts = ids.len().checked_div(width).unwrap_or(0);
        sized("ids", ids.len(), width, prompts)?;
        sized("entries of the mask", mask.len(), width, prompts)?;
        let rows = ids.chunks(width.max(1)).zip(mask.chunks(width.max(1)));
        let tokens = rows.enumerate().map(|(prompt, (ids, mask))| {
            let first = mask.iter().take_while(|&&token| !token).count();
            let len = mask[first..].iter().take_while(|&&token| token).count();
            if mask[first + len..].contains(&true) {
                return Err(BatchError::Hole { prompt, at: first + len });
            }
            Ok(&ids[first..first + len])
        });
        Self::new(&tokens.collect::<Result<Vec<_>, _>>()?)
    }

    /// Number of prompts.
    #[allow(clippy::len_without_is_empty)] // None is.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The tokens of all prompts, end to end.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Which tokens, and rows of hidden states, are each prompt's.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.offsets.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// The tokens of each prompt.
    pub fn prompts(&self) -> impl Iterator<Item = &[u32]> {
        self.ranges().map(|range| &self.ids[range])
    }
}

fn sized(what: &'static str, got: usize, width: usize, prompts: usize) -> Result<(), BatchError> {
    if prompts.checked_mul(width) == Some(got) {
        Ok(())
    } else {
        Err(BatchError::Size { prompts, width, what, got })
    }
}

/// What attention did in one layer to the prompts of a batch.
#[derive(Debug, Clone)]
pub struct BatchTrace {
    /// Index of the layer.
    pub layer: usize,
    /// Which path ran, why, and what it read: of each prompt with tokens in this chunk, by its index.
    pub reports: Vec<(usize, Report)>,
    /// Seconds in every part of the layer, of all prompts together.
    pub parts: PartSeconds,
}

impl Llama {
    /// Empty caches for the prompts of a batch, each with `room` for as many tokens more, and Prism
    /// blocks of `block`.
    ///
    /// # Errors
    /// A block size of 0, or more tokens than indices can hold.
    pub fn batch_caches(
        &self,
        batch: &Batch,
        room: usize,
        block: usize,
    ) -> Result<Vec<LlamaCache>, ModelError> {
        batch.prompts().map(|ids| self.cache(ids.len().saturating_add(room), block)).collect()
    }

    /// [`hidden`](Self::hidden) of several prompts, `caches[i]` being that of prompt i: their final
    /// hidden states `[1, n, hidden]`, end to end as [`Batch::ranges`] says.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden), naming the prompt, or another number of caches than prompts. All
    /// prompts are checked before the first cache is changed.
    pub fn batch_hidden(
        &self,
        batch: &Batch,
        caches: &mut [LlamaCache],
        options: &AttentionOptions,
        trace: Option<&mut dyn FnMut(BatchTrace)>,
    ) -> Result<Tensor<3>, ModelError> {
        self.check_batch(batch, caches)?;
        let sequences = batch.prompts().zip(caches).enumerate();
        let sequences = sequences.map(|(prompt, (ids, cache))| Sequence {
            prompt,
            ids,
            cache,
            options: options.clone(),
        });
        self.pass(sequences.collect(), trace)
    }

    /// [`prefill`](Self::prefill) of several prompts, `caches[i]` being that of prompt i: up to
    /// `chunk` tokens of each at a time, so that each is cut as it would be alone. Returns the logits
    /// `[vocab]` that follow each prompt.
    ///
    /// # Errors
    /// As [`batch_hidden`](Self::batch_hidden), or a chunk of 0.
    pub fn batch_prefill(
        &self,
        batch: &Batch,
        chunk: Option<usize>,
        caches: &mut [LlamaCache],
        trace: Option<&mut dyn FnMut(BatchTrace)>,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.check_batch(batch, caches)?;
        let prompts: Vec<_> = batch.prompts().collect();
        self.prefill_all(&prompts, chunk, caches, trace)
    }

    /// [`predictions`](Self::predictions) of each prompt of a batch from the hidden states
    /// `[1, n, hidden]` of all.
    ///
    /// # Errors
    /// Another number of tokens than hidden states, or the device failed.
    pub fn batch_predictions(
        &self,
        hidden: &Tensor<3>,
        batch: &Batch,
    ) -> Result<Vec<Predictions>, ModelError> {
        let n = hidden.dims()[1];
        if batch.ids.len() != n {
            return Err(ModelError::Lengths { hidden: n, ids: batch.ids.len() });
        }
        let each = batch.ranges().zip(batch.prompts());
        each.map(|(range, ids)| self.predictions(&hidden.clone().slice_dim(1, range), ids))
            .collect()
    }

    fn check_batch(&self, batch: &Batch, caches: &[LlamaCache]) -> Result<(), ModelError> {
        if caches.len() != batch.len() {
            let (what, prompts, got) = ("caches", batch.len(), caches.len());
            return Err(ModelError::BatchSize { what, prompts, got });
        }
        for (prompt, (ids, cache)) in batch.prompts().zip(caches).enumerate() {
            self.check(ids, cache).map_err(|error| error.of_prompt(prompt))?;
        }
        Ok(())
    }

    /// The prefill of checked prompts.
    pub(crate) fn prefill_all(
        &self,
        prompts: &[&[u32]],
        chunk: Option<usize>,
        caches: &mut [LlamaCache],
        mut trace: Option<&mut dyn FnMut(BatchTrace)>,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let longest = prompts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let chunk = chunk.unwrap_or(longest.max(1));
        if chunk == 0 {
            return Err(ModelError::ChunkSize);
        }
        let mut logits = vec![Vec::new(); prompts.len()];
        for start in (0..longest).step_by(chunk) {
            let mut ends = Vec::new();
            let mut rows = 0;
            let mut sequences = Vec::new();
            for (prompt, (&ids, cache)) in prompts.iter().zip(caches.iter_mut()).enumerate() {
                let end = ids.len().min(start.saturating_add(chunk));
                if start >= end {
                    continue;
                }
                rows += end - start;
                let more_follows = end < ids.len();
                if !more_follows {
                    ends.push((prompt, rows - 1));
                }
                let options = AttentionOptions::default().with_more_follows(more_follows);
                sequences.push(Sequence { prompt, ids: &ids[start..end], cache, options });
            }
            let trace: Option<&mut dyn FnMut(BatchTrace)> = match &mut trace {
                Some(trace) => Some(*trace),
                None => None,
            };
            let hidden = self.pass(sequences, trace)?;
            let rows: Vec<_> = ends.iter().map(|&(_, row)| row).collect();
            for ((prompt, _), of_prompt) in ends.into_iter().zip(self.logits_at(&hidden, &rows)?) {
                logits[prompt] = of_prompt;
            }
        }
        Ok(logits)
    }

    /// Logits `[vocab]` of some rows of hidden states `[1, n, hidden]`, in f32 on the host.
    pub(crate) fn logits_at(
        &self,
        hidden: &Tensor<3>,
        rows: &[usize],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let index: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let index = TensorData::new(index, [rows.len()]);
        let index = Tensor::<1, Int>::from_data(index, (&hidden.device(), DType::I32));
        let logits = read_f32(self.logits(hidden.clone().select(1, index)))?;
        Ok(logits.chunks(self.config.vocab_size).map(<[f32]>::to_vec).collect())
    }
}

/// A prompt's part in one pass through the layers.
pub(crate) struct Sequence<'a> {
    /// Its index in the batch.
    pub prompt: usize,
    /// Its next tokens, at least one.
    pub ids: &'a [u32],
    /// Where they go.
    pub cache: &'a mut LlamaCache,
    pub options: AttentionOptions,
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::checkpoint::Checkpoint;

    /// Rows of one prompt lie beside those of another in every product, but never mix with them.
    #[test]
    fn does_a_prompt_notice_what_is_wrong_with_its_neighbour() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/models/tiny-llama31");
        let device = Device::flex();
        let checkpoint = Checkpoint::open(root).unwrap();
        let mut llama = Llama::load(&checkpoint, DType::F32, &device, &mut |_, _| {}).unwrap();
        let config = llama.prism_config().with_block(16).with_dense_below(0);
        llama.set_attention(Some(&config)).unwrap();
        let [_, width] = llama.embedding.dims();
        let poison = Tensor::full([1, width], f32::NAN, &device);
        llama.embedding = llama.embedding.map(|x| x.slice_assign([511..512, 0..width], poison));
        let sound: Vec<u32> = (0..70).map(|i| i * 7).collect();
        let run = |prompts: &[&[u32]]| {
            let batch = Batch::new(prompts).unwrap();
            let mut caches = llama.batch_caches(&batch, 0, 16).unwrap();
            llama.batch_prefill(&batch, None, &mut caches, None).unwrap()
        };
        let right = run(&[&sound, &sound[..20], &sound]);
        let got = run(&[&sound, &[511; 20], &sound]);
        assert!(got[1].iter().all(|logit| logit.is_nan()));
        assert!(got[0].iter().all(|logit| logit.is_finite()));
        assert_eq!((&got[0], &got[2]), (&right[0], &right[2]));
    }
}
