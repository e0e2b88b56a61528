//! The architectures that [`Llama`](crate::Llama) runs, and what each implies beside the sizes.

use burn_prism::{Budget, Rope};

use crate::presets;

/// A family of decoders that share one structure and differ in biases and norms of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3, 3.1, 3.2 and whatever else calls itself `LlamaForCausalLM`.
    Llama,
    /// Mistral without its sliding window.
    Mistral,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: queries and keys are normalised head by head before they are rotated.
    Qwen3,
}

/// For messages.
pub(crate) const SUPPORTED: &str = "llama, mistral, qwen2, qwen3";

impl Architecture {
    /// Every one, in the order of [`architecture_table`].
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The class name of Hugging Face, as `architectures` in `config.json` has it.
    pub fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The architecture of a class name of Hugging Face.
    pub(super) fn from_class(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.class() == name)
    }

    /// The architecture of a GGUF file. Mistral calls itself `llama` there.
    pub(crate) fn from_gguf(name: &str) -> Option<Self> {
        Some(match name {
            "llama" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            _ => return None,
        })
    }

    /// The `model_type` of `config.json`, and the prefix of the keys of a GGUF file.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether queries and keys are normalised head by head.
    pub(crate) fn has_qk_norm(self) -> bool {
        self == Self::Qwen3
    }
}

/// The architectures as a table in Markdown: that of `docs/models.md`.
pub fn architecture_table() -> String {
    let mut table = String::from(
        "| `architectures` | in GGUF | models | beside Llama's structure | Prism's mass |\n\
         |---|---|---|---|---|\n",
    );
    for architecture in Architecture::ALL {
        let (models, beside) = match architecture {
            Architecture::Llama => (
                "Llama 2, 3, 3.1, 3.2, SmolLM2, …",
                "biases on q, k, v and o with `attention_bias`",
            ),
            Architecture::Mistral => (
                "Mistral without its window",
                "`sliding_window` must be there and null: absent means 4096",
            ),
            Architecture::Qwen2 => ("Qwen 2, 2.5", "biases on q, k and v"),
            Architecture::Qwen3 => (
                "Qwen 3, dense",
                "RMS norm of queries and keys, head by head before the rotation; `head_dim` must be \
                 given; biases as Llama",
            ),
        };
        // Mistral has no name of its own there.
        let name = architecture.model_type();
        let gguf = match Architecture::from_gguf(name) {
            Some(_) => format!("`{name}`"),
            None => "as `llama`".into(),
        };
        let budget = presets::of(architecture.into(), Rope::new(1e4)).selection.budget;
        let mass = match budget {
            Budget::Mass(mass) => mass.to_string(),
            Budget::TopK(blocks) => format!("{blocks} blocks"),
        };
        let class = architecture.class();
        table += &format!("| `{class}` | {gguf} | {models} | {beside} | {mass} |\n");
    }
    table
}
