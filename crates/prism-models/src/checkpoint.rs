//! One view of a model's files, whichever way they are stored: the names and the row order of
//! Hugging Face, weights in the element type asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{DType, Element, ElementConversion, ElementLimits, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::generation_config::GenerationConfig;
use crate::gguf::GgufFile;
use crate::llama3_factors;
use crate::names::{self, RowOrder};
use crate::safetensors_dir::SafetensorsDir;
use crate::template::ChatTemplate;
use crate::tokenizer::{SpecialTokens, Tokenizer};

/// The Llama 3 divisors of the rotary frequencies in GGUF files.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// The weights, configuration, tokenizer and chat template of one model.
#[derive(Debug)]
pub struct Checkpoint {
    files: Files,
    config: ModelConfig,
    /// Where each tensor is stored, by canonical name.
    stored: BTreeMap<String, Stored>,
}

#[derive(Debug)]
enum Files {
    Gguf(Box<GgufFile>),
    Directory(SafetensorsDir),
}

#[derive(Debug)]
struct Stored {
    name: String,
    order: RowOrder,
}

/// How the tensors of a checkpoint differ from those that its configuration implies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorAudit {
    /// Canonical names of the tensors that the model needs and the checkpoint lacks, sorted.
    pub missing: Vec<String>,
    /// Names of the tensors that the checkpoint has and the model does not use, sorted.
    pub unexpected: Vec<String>,
}

impl Checkpoint {
    /// Opens a Hugging Face directory, or a GGUF file.
    ///
    /// # Errors
    ///
    /// The path cannot be read, or the weights or the configuration are refused.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(|source| crate::files::io(path, source))?;
        if metadata.is_dir() {
            Self::from_directory(SafetensorsDir::open(path)?)
        } else {
            Self::from_gguf(GgufFile::open(path)?)
        }
    }

    fn from_directory(directory: SafetensorsDir) -> Result<Self, LoadError> {
        let config = directory.config()?;
        let names = directory.weights().tensor_names().map(str::to_owned);
        let stored =
            names.map(|name| (name.clone(), Stored { name, order: RowOrder::Halves })).collect();
        Ok(Self { files: Files::Directory(directory), config, stored })
    }

    fn from_gguf(file: GgufFile) -> Result<Self, LoadError> {
        let refused = |source| LoadError::Config { path: file.path().into(), source };
        let has_tensor = |name: &str| file.tensor_info(name).is_some();
        let mut config = ModelConfig::from_gguf(file.metadata(), has_tensor).map_err(refused)?;
        if has_tensor(ROPE_DIVISORS) {
            let divisors = file.dequantise(ROPE_DIVISORS)?;
            config.rope.scaling =
                llama3_factors::recognise(&divisors, &config.rope, config.head_dim)
                    .map_err(refused)?;
        }
        let stored = file
            .tensor_names()
            .filter(|&name| name != ROPE_DIVISORS)
            .map(|name| {
                let plain = || (name.to_owned(), RowOrder::Halves);
                let (canonical, order) =
                    names::from_gguf(name, config.architecture).unwrap_or_else(plain);
                (canonical, Stored { name: name.to_owned(), order })
            })
            .collect();
        Ok(Self { files: Files::Gguf(Box::new(file)), config, stored })
    }

    /// The file behind the checkpoint, if it is a GGUF file.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.files {
            Files::Gguf(file) => Some(file),
            Files::Directory(_) => None,
        }
    }

    /// Sizes and settings of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The canonical names of the tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.stored.keys().map(String::as_str)
    }

    /// The row-major shape of a tensor, by canonical name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let stored = &self.stored.get(name)?.name;
        match &self.files {
            Files::Gguf(file) => file.tensor_info(stored).map(|info| info.shape.as_slice()),
            Files::Directory(directory) => {
                directory.weights().tensor_info(stored).map(|info| info.shape.as_slice())
            }
        }
    }

    /// Checks that a tensor is there and has a shape, without reading it.
    ///
    /// # Errors
    ///
    /// The tensor is missing or has another shape.
    pub fn check_shape(&self, name: &str, expected: &[usize]) -> Result<(), LoadError> {
        match self.shape(name) {
            None => Err(LoadError::MissingTensor { name: name.into() }),
            Some(got) if got != expected => {
                let (expected, got) = (expected.to_vec(), got.to_vec());
                Err(LoadError::WrongShape { name: name.into(), expected, got })
            }
            Some(_) => Ok(()),
        }
    }

    /// Reads a tensor by canonical name as 32-bit floats, row-major.
    ///
    /// # Errors
    ///
    /// The tensor is missing, has another shape, is stored in a type that cannot be converted, or
    /// there is no memory for its values.
    pub fn f32_tensor(&self, name: &str, expected_shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        self.values(name, expected_shape)
    }

    /// As [`Checkpoint::f32_tensor`], and refuses NaN and infinite weights.
    ///
    /// # Errors
    ///
    /// Those of [`Checkpoint::f32_tensor`], and [`LoadError::NonFiniteWeight`].
    pub fn finite_f32_tensor(
        &self,
        name: &str,
        expected_shape: &[usize],
    ) -> Result<Vec<f32>, LoadError> {
        self.finite_values(name, expected_shape)
    }

    /// Reads a tensor by canonical name as values of `dtype`, which is F32, F16 or BF16, and
    /// refuses NaN and infinite weights.
    ///
    /// From safetensors nothing is held beside these values but a few megabytes of the file.
    ///
    /// # Errors
    ///
    /// Those of [`Checkpoint::finite_f32_tensor`], a weight too large for the type, or another
    /// type.
    pub fn finite_data(
        &self,
        name: &str,
        expected_shape: &[usize],
        dtype: DType,
    ) -> Result<TensorData, LoadError> {
        let shape = expected_shape.to_vec();
        Ok(match dtype {
            DType::F32 => TensorData::new(self.finite_values::<f32>(name, &shape)?, shape),
            DType::F16 => TensorData::new(self.finite_values::<f16>(name, &shape)?, shape),
            DType::BF16 => TensorData::new(self.finite_values::<bf16>(name, &shape)?, shape),
            got => return Err(LoadError::WeightType { got }),
        })
    }

    fn finite_values<T: Element + ElementLimits>(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<Vec<T>, LoadError> {
        let values = self.values::<T>(name, shape)?;
        let Some(index) = values.par_iter().position_first(|value| !value.to_f32().is_finite())
        else {
            return Ok(values);
        };
        // Read again: what the file says, not what became of it.
        let value = self.values::<f32>(name, shape)?[index];
        let name = name.to_owned();
        Err(if value.is_finite() {
            let (dtype, limit) = (T::dtype(), T::MAX.to_f32());
            LoadError::WeightOverflow { name, index, value, dtype, limit }
        } else {
            LoadError::NonFiniteWeight { name, index, value }
        })
    }

    fn values<T: Element>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>, LoadError> {
        self.check_shape(name, shape)?;
        let missing = || LoadError::MissingTensor { name: name.into() };
        let stored = self.stored.get(name).ok_or_else(missing)?;
        let file = match &self.files {
            Files::Directory(directory) => return directory.weights().values(&stored.name),
            Files::Gguf(file) => file,
        };
        let values = file.dequantise(&stored.name)?;
        let heads = match stored.order {
            RowOrder::Halves => None,
            RowOrder::InterleavedQ => Some(self.config.q_heads),
            RowOrder::InterleavedK => Some(self.config.kv_heads),
        };
        let values = match heads {
            None => values,
            Some(heads) => {
                let head_dim = self.config.head_dim;
                if shape.first() != Some(&(heads * head_dim)) {
                    let mut expected = shape.to_vec();
                    expected[0] = heads * head_dim;
                    let (name, got) = (name.into(), shape.to_vec());
                    return Err(LoadError::WrongShape { name, expected, got });
                }
                names::halves_from_interleaved(&values, heads, head_dim)
            }
        };
        Ok(values.into_iter().map(|value| value.elem()).collect())
    }

    /// The names and row-major shapes of all tensors that the model needs.
    pub fn expected_tensors(&self) -> Vec<(String, Vec<usize>)> {
        names::expected(&self.config)
    }

    /// Compares the names in the checkpoint with those that the model needs.
    pub fn audit(&self) -> TensorAudit {
        let expected: BTreeSet<_> =
            self.expected_tensors().into_iter().map(|(name, _)| name).collect();
        let missing = expected.iter().filter(|name| !self.stored.contains_key(*name));
        let unexpected = self.stored.keys().filter(|name| {
            // Tied models may carry a copy of the embeddings, and old ones the rotary tables.
            let copy = self.config.tie_embeddings && *name == "lm_head.weight";
            !(expected.contains(*name) || copy || name.ends_with(".rotary_emb.inv_freq"))
        });
        TensorAudit {
            missing: missing.cloned().collect(),
            unexpected: unexpected.cloned().collect(),
        }
    }

    /// Reads the tokenizer.
    ///
    /// # Errors
    ///
    /// It is missing or refused, or it yields ids that the embedding table has no row for.
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        let (tokenizer, path) = match &self.files {
            Files::Directory(directory) => (directory.tokenizer()?, directory.config_path()),
            Files::Gguf(file) => {
                let path = file.path().to_path_buf();
                match Tokenizer::from_gguf(file.metadata()) {
                    Ok(tokenizer) => (tokenizer, path),
                    Err(source) => return Err(LoadError::Tokenizer { path, source }),
                }
            }
        };
        match tokenizer.check_fits(self.config.vocab_size) {
            Ok(()) => Ok(tokenizer),
            Err(source) => Err(LoadError::Tokenizer { path, source }),
        }
    }

    /// Reads the chat template; `None` where the model has none.
    ///
    /// # Errors
    ///
    /// A file is refused, or the template does not parse.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, LoadError> {
        match &self.files {
            Files::Directory(directory) => directory.chat_template(),
            Files::Gguf(file) => ChatTemplate::from_gguf(file.metadata())
                .map_err(|source| LoadError::Template { path: file.path().into(), source }),
        }
    }

    /// The names of the tokens that begin and end a text: the tokenizer's own where a directory
    /// says them, else those of the configured ids.
    ///
    /// # Errors
    ///
    /// `tokenizer_config.json` is refused, or an id is not in the vocabulary.
    pub fn special_tokens(&self, tokenizer: &Tokenizer) -> Result<SpecialTokens, LoadError> {
        let (named, path) = match &self.files {
            Files::Directory(directory) => (directory.special_tokens()?, directory.config_path()),
            Files::Gguf(file) => (None, file.path().to_path_buf()),
        };
        if let Some(named) = named {
            return Ok(named);
        }
        let token = |ids: &[u32]| ids.first().map(|&id| tokenizer.token(id)).transpose();
        let refused = |source| LoadError::Tokenizer { path: path.clone(), source };
        Ok(SpecialTokens {
            bos: token(&self.config.bos_ids).map_err(refused)?,
            eos: token(&self.config.eos_ids).map_err(refused)?,
        })
    }

    /// Ids that end an answer: those of the configuration (`config.json` and
    /// `generation_config.json`, or GGUF metadata), and the tokenizer's own end of text.
    ///
    /// # Errors
    ///
    /// As [`special_tokens`](Self::special_tokens).
    pub fn end_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, LoadError> {
        let mut ids = self.config.eos_ids.clone();
        // A name that the vocabulary lacks can't be generated, so that it needs no id.
        let eos = self.special_tokens(tokenizer)?.eos;
        let own = eos.and_then(|token| tokenizer.token_id(&token).ok());
        ids.extend(own.filter(|id| !self.config.eos_ids.contains(id)));
        Ok(ids)
    }

    /// The recommended sampling: `generation_config.json`, or GGUF metadata.
    ///
    /// # Errors
    ///
    /// A setting has another type.
    pub fn generation_config(&self) -> Result<GenerationConfig, LoadError> {
        match &self.files {
            Files::Directory(directory) => directory.generation_config(),
            Files::Gguf(file) => GenerationConfig::from_gguf(file.metadata())
                .map_err(|source| LoadError::Config { path: file.path().into(), source }),
        }
    }
}
