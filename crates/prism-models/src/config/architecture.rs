//! The architectures that [`Llama`](crate::Llama) runs, and what each implies beside the sizes.

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
    /// The architecture of a class name of Hugging Face, as in `LlamaForCausalLM`.
    pub(super) fn from_class(name: &str) -> Option<Self> {
        Some(match name {
            "LlamaForCausalLM" => Self::Llama,
            "MistralForCausalLM" => Self::Mistral,
            "Qwen2ForCausalLM" => Self::Qwen2,
            "Qwen3ForCausalLM" => Self::Qwen3,
            _ => return None,
        })
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
