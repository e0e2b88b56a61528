//! A Hugging Face model directory with its weights in safetensors files.

use std::path::{Path, PathBuf};

use crate::config::{MAX_CONFIG_BYTES, ModelConfig};
use crate::error::LoadError;
use crate::files;
use crate::generation_config::GenerationConfig;
use crate::shards::Shards;
use crate::template::{ChatTemplate, MAX_TEMPLATE_BYTES};
use crate::tokenizer::{MAX_TOKENIZER_BYTES, SpecialTokens, Tokenizer};

/// A directory as the Hugging Face Hub lays it out: `config.json`, `model.safetensors` or
/// shards under `model.safetensors.index.json`, `tokenizer.json`, and optionally `generation_config.json`, `tokenizer_config.json` and
/// `chat_template.jinja`.
#[derive(Debug)]
pub struct SafetensorsDir {
    dir: PathBuf,
    weights: Shards,
}

impl SafetensorsDir {
    /// Opens the weights of a directory: `model.safetensors` or else the shards of
    /// `model.safetensors.index.json`.
    ///
    /// # Errors
    ///
    /// The directory has no weights, a file is refused, or the shards are not as their index says.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, LoadError> {
        let dir = dir.as_ref().to_path_buf();
        let path = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let weights = if exists(&path)? {
            Shards::single(&path)?
        } else if exists(&index)? {
            Shards::indexed(&dir, &index)?
        } else {
            return Err(LoadError::MissingFile { dir, name: "model.safetensors" });
        };
        Ok(Self { weights, dir })
    }

    /// The files of the weights.
    pub fn weights(&self) -> &Shards {
        &self.weights
    }

    /// The path of `config.json`.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// Reads `config.json`, with the end ids of `generation_config.json` where there is one.
    ///
    /// # Errors
    ///
    /// `config.json` is missing, or one of the files is refused.
    pub fn config(&self) -> Result<ModelConfig, LoadError> {
        let (path, json) = self.required("config.json", MAX_CONFIG_BYTES)?;
        let config = ModelConfig::from_hugging_face(&json)
            .map_err(|source| LoadError::Config { path, source })?;
        match self.optional("generation_config.json", MAX_CONFIG_BYTES)? {
            None => Ok(config),
            Some((path, json)) => config
                .with_generation_config(&json)
                .map_err(|source| LoadError::Config { path, source }),
        }
    }

    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// The file is missing or refused.
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        let (path, json) = self.required("tokenizer.json", MAX_TOKENIZER_BYTES)?;
        Tokenizer::from_json(&json).map_err(|source| LoadError::Tokenizer { path, source })
    }

    /// Reads the chat template from `chat_template.jinja` or else `tokenizer_config.json`; `None`
    /// where neither has one.
    ///
    /// # Errors
    ///
    /// A file is refused, or the template does not parse.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, LoadError> {
        let own = self.optional("chat_template.jinja", MAX_TEMPLATE_BYTES as u64)?;
        let (path, template) = match own {
            Some((path, source)) => (path, ChatTemplate::from_bytes(source).map(Some)),
            None => match self.optional("tokenizer_config.json", MAX_CONFIG_BYTES)? {
                Some((path, json)) => (path, ChatTemplate::from_tokenizer_config(&json)),
                None => return Ok(None),
            },
        };
        template.map_err(|source| LoadError::Template { path, source })
    }

    /// Reads the names of the special tokens from `tokenizer_config.json`; `None` without one.
    ///
    /// # Errors
    ///
    /// The file is refused.
    pub fn special_tokens(&self) -> Result<Option<SpecialTokens>, LoadError> {
        let Some((path, json)) = self.optional("tokenizer_config.json", MAX_CONFIG_BYTES)? else {
            return Ok(None);
        };
        let tokens = SpecialTokens::from_tokenizer_config(&json);
        tokens.map(Some).map_err(|source| LoadError::Tokenizer { path, source })
    }

    /// Reads the recommended sampling from `generation_config.json`; empty without one.
    ///
    /// # Errors
    ///
    /// The file is refused.
    pub fn generation_config(&self) -> Result<GenerationConfig, LoadError> {
        match self.optional("generation_config.json", MAX_CONFIG_BYTES)? {
            None => Ok(GenerationConfig::default()),
            Some((path, json)) => GenerationConfig::from_hugging_face(&json)
                .map_err(|source| LoadError::Config { path, source }),
        }
    }

    fn optional(
        &self,
        name: &'static str,
        limit: u64,
    ) -> Result<Option<(PathBuf, Vec<u8>)>, LoadError> {
        let path = self.dir.join(name);
        if !exists(&path)? {
            return Ok(None);
        }
        let bytes = files::read(&path, limit)?;
        Ok(Some((path, bytes)))
    }

    fn required(&self, name: &'static str, limit: u64) -> Result<(PathBuf, Vec<u8>), LoadError> {
        let missing = || LoadError::MissingFile { dir: self.dir.clone(), name };
        self.optional(name, limit)?.ok_or_else(missing)
    }
}

/// Whether there is anything at `path`; a loop of links or a forbidden directory is an error.
fn exists(path: &Path) -> Result<bool, LoadError> {
    path.try_exists().map_err(|source| files::io(path, source))
}
