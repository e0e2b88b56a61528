//! What a model refuses, and why it fails.

use burn::tensor::{DType, Tensor};
use prism_core::PrismError;
use thiserror::Error;

use crate::error::LoadError;
use crate::policy::PolicyError;
use crate::sample::SampleError;

/// Why a model could not be loaded or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The files are at fault.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Attention refused.
    #[error(transparent)]
    Attention(#[from] PrismError),
    /// The policy of attention doesn't fit the model.
    #[error("policy: {0}")]
    Policy(#[from] PolicyError),
    /// The next token could not be chosen.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The checkpoint holds weights that the model has no place for.
    #[error("the checkpoint holds {} tensors that this model doesn't use, the first is {}",
        names.len(), names.first().map_or("", String::as_str))]
    UnexpectedTensors {
        /// Their names.
        names: Vec<String>,
    },
    /// An element type that models can't compute in, or that the device lacks.
    #[error(
        "can't compute in {dtype:?} on {device}; allowed: of F32, F16 and BF16 what the device has"
    )]
    ComputeType {
        /// The type asked for.
        dtype: DType,
        /// The device.
        device: String,
    },
    /// No tokens to run.
    #[error("there are no tokens to run")]
    NoTokens,
    /// A token id past the vocabulary.
    #[error("token id {id} is past the vocabulary of {vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// More tokens than the cache has room for.
    #[error("{tokens} more tokens don't fit the cache: {free} positions are free")]
    CacheFull {
        /// Tokens to run.
        tokens: usize,
        /// Free positions.
        free: usize,
    },
    /// A cache of another model.
    #[error("the cache is for {got} layers, the model has {layers}")]
    CacheLayers {
        /// Layers of the model.
        layers: usize,
        /// Layers of the cache.
        got: usize,
    },
    /// A prompt of a batch is at fault.
    #[error("prompt {prompt}: {source}")]
    Prompt {
        /// Its index.
        prompt: usize,
        /// The fault.
        source: Box<ModelError>,
    },
    /// Something that a batch needs one of for each of its prompts.
    #[error("a batch of {prompts} prompts needs as many {what}, got {got}")]
    BatchSize {
        /// What.
        what: &'static str,
        /// Prompts.
        prompts: usize,
        /// The number got.
        got: usize,
    },
    /// A layer past the last.
    #[error("there is no layer {layer}: the model has {layers}")]
    NoSuchLayer {
        /// The layer asked for.
        layer: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// Inverse frequencies for another number of rotary pairs.
    #[error("the heads have {pairs} rotary pairs, but {got} inverse frequencies were given")]
    RotaryPairs {
        /// Pairs of a head.
        pairs: usize,
        /// Frequencies given.
        got: usize,
    },
    /// A prefill chunk of 0 tokens.
    #[error("a prefill chunk must hold at least 1 token, got 0")]
    ChunkSize,
    /// Hidden states and ids that don't belong together.
    #[error("{hidden} hidden states, but {ids} token ids")]
    Lengths {
        /// Hidden states.
        hidden: usize,
        /// Ids.
        ids: usize,
    },
    /// The device failed.
    #[error("reading from the device failed: {reason}")]
    Read {
        /// What it said.
        reason: String,
    },
}

impl ModelError {
    /// The error of one prompt of a batch.
    pub(crate) fn of_prompt(self, prompt: usize) -> Self {
        Self::Prompt { prompt, source: Box::new(self) }
    }
}

/// Reads a tensor to the host as f32.
pub(crate) fn read_f32<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    let data = tensor
        .try_into_data_dtype(DType::F32)
        .map_err(|error| ModelError::Read { reason: error.to_string() })?;
    data.try_into_vec::<f32>().map_err(|error| ModelError::Read { reason: format!("{error:?}") })
}
