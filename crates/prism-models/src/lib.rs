//! Llama, Mistral and Qwen models for Burn with Prism attention, from files to text.
//!
//! Reading order: [`checkpoint`] (a Hugging Face directory or a [`gguf`] file, seen alike;
//! [`safetensors_dir`], [`shards`], [`safetensors_file`]),
//! [`config`] (and [`shapes`] of known models), [`llama`] with [`self_attention`], [`rope`] and [`mlp`] (the model), [`load`] and [`random`] (its weights), [`policy`] and [`presets`] (how it attends),
//! [`tokenizer`] and [`template`] (text in), [`sample`], [`generate`] and [`stop`] (text out),
//! [`session`] (several turns on one cache), [`batch`] (prompts together), [`perplexity`], [`memory`] (what a prompt will take).
//!
//! Files are untrusted. Every reader here validates before it allocates, and answers a bad file
//! with a typed error that says the limit and the value it got.

pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod error;
mod files;
mod forward;
pub mod generate;
pub mod generation_config;
pub mod gguf;
pub mod llama;
mod llama3_factors;
pub mod load;
pub mod memory;
pub mod mlp;
pub mod model_error;
pub mod names;
pub mod perplexity;
pub mod policy;
pub mod presets;
mod projection;
pub mod random;
pub mod rope;
mod rows;
pub mod safetensors_dir;
pub mod safetensors_file;
pub mod sample;
pub mod self_attention;
pub mod session;
pub mod shapes;
pub mod shards;
pub mod stop;
pub mod stopwatch;
pub mod template;
pub mod tokenizer;

pub use batch::{Batch, BatchError, BatchTrace};
pub use checkpoint::{Checkpoint, TensorAudit};
pub use config::{Architecture, ModelConfig};
pub use error::{ConfigError, LoadError};
pub use forward::LayerInputs;
pub use generate::{Finish, Generated};
pub use generation_config::GenerationConfig;
pub use llama::{Llama, LlamaCache};
pub use memory::Memory;
pub use model_error::ModelError;
pub use perplexity::Predictions;
pub use policy::{AttentionPolicy, LayerOverride, LayerSettings, PolicyError};
pub use sample::{SampleError, Sampler, Sampling};
pub use self_attention::LayerTrace;
pub use session::Session;
pub use stop::StopTexts;
pub use stopwatch::PartSeconds;
pub use template::{ChatTemplate, Message, TemplateError, TemplateVariables};
pub use tokenizer::{DecodeStream, SpecialTokens, Tokenizer, TokenizerError};

/// The code of `docs/models.md`, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/models.md")]
struct ModelsPage;

/// The code of `docs/policies.md`, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/policies.md")]
struct PoliciesPage;
