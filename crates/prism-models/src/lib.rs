//! Everything around a Llama model that is not tensor arithmetic: opening checkpoints (a Hugging
//! Face directory or a GGUF file), tokenizing, rendering chat templates and sampling.
//!
//! Files are untrusted. Every reader here validates before it allocates, and answers a bad file
//! with a typed error that says the limit and the value it got.

pub mod checkpoint;
pub mod config;
pub mod error;
mod files;
pub mod gguf;
mod llama3_factors;
pub mod names;
pub mod rope_settings;
pub mod safetensors_dir;
pub mod sample;
pub mod template;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, TensorAudit};
pub use config::ModelConfig;
pub use error::{ConfigError, LoadError};
pub use rope_settings::{RopeScaling, RopeSettings};
pub use sample::{SampleError, Sampler};
pub use template::{ChatTemplate, Message, TemplateError};
pub use tokenizer::{DecodeStream, Tokenizer, TokenizerError};

#[cfg(feature = "flex")]
pub mod generate;
#[cfg(feature = "flex")]
pub mod llama;
#[cfg(feature = "flex")]
pub mod load;
#[cfg(feature = "flex")]
pub mod mlp;
#[cfg(feature = "flex")]
pub mod model_error;
#[cfg(feature = "flex")]
pub mod perplexity;
#[cfg(feature = "flex")]
pub mod rope;
#[cfg(feature = "flex")]
pub mod self_attention;
#[cfg(feature = "flex")]
pub use llama::{Llama, LlamaCache};
#[cfg(feature = "flex")]
pub use model_error::ModelError;
#[cfg(feature = "flex")]
pub use perplexity::Predictions;
#[cfg(feature = "flex")]
pub use self_attention::LayerTrace;
