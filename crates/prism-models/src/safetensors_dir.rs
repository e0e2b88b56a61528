//! A Hugging Face model directory with its weights in one safetensors file.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::config::{MAX_CONFIG_BYTES, ModelConfig};
use crate::error::LoadError;
use crate::files;
use crate::template::{ChatTemplate, MAX_TEMPLATE_BYTES};
use crate::tokenizer::{MAX_TOKENIZER_BYTES, Tokenizer};

/// Bytes of the length that precedes the header.
const LENGTH_BYTES: usize = 8;
/// Largest header that the format allows, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Values that one task decodes: long enough to pay for starting it.
const TASK_VALUES: usize = 1 << 16;

/// Why a safetensors file was refused.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// The file ends before the header's length.
    #[error("the file has {got} bytes; the length of the header alone takes {LENGTH_BYTES}")]
    TooShort {
        /// Bytes of the file.
        got: usize,
    },
    /// The header is longer than the format allows.
    #[error("the header has {got} bytes; the limit is {limit}")]
    HeaderTooLarge {
        /// Most bytes accepted.
        limit: u64,
        /// Length in the file.
        got: u64,
    },
    /// The header reaches past the end of the file.
    #[error("the header has {got} bytes; {limit} are left in the file")]
    HeaderPastEnd {
        /// Bytes after the header's length.
        limit: usize,
        /// Length in the file.
        got: u64,
    },
    /// The header is not UTF-8.
    #[error("the header is not UTF-8: {0}")]
    NotUtf8(#[from] std::str::Utf8Error),
    /// The header is not JSON of the expected form, or a name occurs twice in it.
    #[error("the header is malformed: {0}")]
    BadHeader(#[from] serde_json::Error),
    /// A tensor reaches past the end of the file.
    #[error("tensor `{name}` ends at {got}; the data section has {limit} bytes")]
    PastEnd {
        /// Tensor.
        name: String,
        /// Bytes of the data section.
        limit: u64,
        /// End of the tensor in the data section.
        got: u64,
    },
    /// Tensors overlap, leave gaps, do not match their shapes, or do not fill the file.
    #[error("{0}")]
    BadLayout(#[from] SafeTensorError),
    /// A tensor is not made of floats that can be converted.
    #[error("tensor `{name}` has dtype {got}; supported: F32, F16, BF16, F64")]
    UnsupportedDtype {
        /// Tensor.
        name: String,
        /// Type in the file.
        got: Dtype,
    },
}

/// An open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

impl SafetensorsFile {
    /// Maps a file and validates its header.
    ///
    /// # Errors
    ///
    /// The path is not a readable, regular, non-empty file, or its contents are malformed
    /// ([`SafetensorsError`]).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref().to_path_buf();
        let map = files::map(&path)?;
        match parse(&map) {
            Ok((metadata, data_start)) => Ok(Self { path, map, metadata, data_start }),
            Err(source) => Err(LoadError::Safetensors { path, source }),
        }
    }

    /// The names of the tensors, in the order of their data.
    pub fn tensor_names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Row-major shape and type of a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// Converts a tensor to 32-bit floats, row-major.
    ///
    /// # Errors
    ///
    /// There is no such tensor, it is not made of floats, or there is no memory for its values.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let missing = || LoadError::MissingTensor { name: name.into() };
        let info = self.tensor_info(name).ok_or_else(missing)?;
        let (start, end) = info.data_offsets;
        let bytes = &self.map[self.data_start + start..self.data_start + end];
        let (width, convert): (usize, fn(&[u8]) -> f32) = match info.dtype {
            Dtype::F32 => (4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::F16 => (2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
            Dtype::BF16 => (2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Dtype::F64 => {
                (8, |b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
            }
            got => {
                let source = SafetensorsError::UnsupportedDtype { name: name.into(), got };
                return Err(LoadError::Safetensors { path: self.path.clone(), source });
            }
        };
        let elements = bytes.len() / width;
        let mut values = Vec::new();
        values
            .try_reserve_exact(elements)
            .map_err(|_| LoadError::OutOfMemory { name: name.into(), elements })?;
        values.resize(elements, 0.0);
        values.par_chunks_mut(TASK_VALUES).zip(bytes.par_chunks(TASK_VALUES * width)).for_each(
            |(values, bytes)| {
                for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(width)) {
                    *value = convert(bytes);
                }
            },
        );
        Ok(values)
    }
}

fn parse(bytes: &[u8]) -> Result<(Metadata, usize), SafetensorsError> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(SafetensorsError::TooShort { got: bytes.len() });
    };
    let got = u64::from_le_bytes(*length);
    if got > MAX_HEADER_BYTES {
        return Err(SafetensorsError::HeaderTooLarge { limit: MAX_HEADER_BYTES, got });
    }
    let length = got as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(SafetensorsError::HeaderPastEnd { limit: rest.len(), got });
    };
    let header: Header = serde_json::from_str(std::str::from_utf8(header)?)?;
    let limit = data.len() as u64;
    if let Some((name, got)) = header.ends.into_iter().find(|(_, end)| *end > limit) {
        return Err(SafetensorsError::PastEnd { name, limit, got });
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    Ok((metadata, LENGTH_BYTES + length))
}

/// The ends of the tensors, read ahead of the `safetensors` crate, which keeps the last of two
/// tensors of one name and adds up the ends before it compares them with the file.
struct Header {
    ends: Vec<(String, u64)>,
}

#[derive(serde::Deserialize)]
struct HeaderEntry {
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut names = HashSet::new();
                let mut ends = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("`{name}` occurs twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let entry: HeaderEntry = map.next_value()?;
                        ends.push((name, entry.data_offsets.1));
                    }
                }
                Ok(Header { ends })
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// A directory as the Hugging Face Hub lays it out: `config.json`, `model.safetensors`,
/// `tokenizer.json`, and optionally `generation_config.json`, `tokenizer_config.json` and
/// `chat_template.jinja`.
#[derive(Debug)]
pub struct SafetensorsDir {
    dir: PathBuf,
    weights: SafetensorsFile,
}

impl SafetensorsDir {
    /// Opens the weights of a directory.
    ///
    /// # Errors
    ///
    /// The directory has no weights or has them in several files, or the file is refused.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, LoadError> {
        let dir = dir.as_ref().to_path_buf();
        let path = dir.join("model.safetensors");
        if !exists(&path)? {
            let index = dir.join("model.safetensors.index.json");
            if exists(&index)? {
                return Err(LoadError::ShardedWeights { path: index });
            }
            return Err(LoadError::MissingFile { dir, name: "model.safetensors" });
        }
        Ok(Self { weights: SafetensorsFile::open(path)?, dir })
    }

    /// The file of the weights.
    pub fn weights(&self) -> &SafetensorsFile {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn do_all_float_types_convert_at_any_alignment() {
        let header = concat!(
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#,
            r#""b":{"dtype":"F16","shape":[1],"data_offsets":[4,6]},"#,
            r#""c":{"dtype":"BF16","shape":[1],"data_offsets":[6,8]},"#,
            r#""d":{"dtype":"F64","shape":[1,1],"data_offsets":[8,16]}}"#,
        );
        for padding in 0..4 {
            let header = format!("{header}{}", " ".repeat(padding));
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(1.5f32.to_le_bytes());
            bytes.extend(f16::from_f32(-2.0).to_le_bytes());
            bytes.extend(bf16::from_f32(3.0).to_le_bytes());
            bytes.extend(0.125f64.to_le_bytes());
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("x.safetensors");
            std::fs::write(&path, bytes).unwrap();
            let file = SafetensorsFile::open(path).unwrap();
            assert_eq!(file.tensor_names(), ["a", "b", "c", "d"]);
            let first = |name| file.to_f32(name).unwrap()[0];
            assert_eq!(["a", "b", "c", "d"].map(first), [1.5, -2.0, 3.0, 0.125]);
            assert_eq!(file.tensor_info("d").unwrap().shape, [1, 1]);
        }
    }
}
