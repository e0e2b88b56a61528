//! One safetensors file: its header, checked, and its weights in the element type asked for.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use burn::tensor::{Element, ElementConversion};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::LoadError;
use crate::files;

/// Bytes of the length that precedes the header.
const LENGTH_BYTES: usize = 8;
/// Largest header that the format allows, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Values that one task decodes: long enough to pay for starting it.
const TASK_VALUES: usize = 1 << 16;
/// Values after which the pages they were read from are given back.
const WINDOW_VALUES: usize = 1 << 20;
/// Most dimensions of a tensor: far above any weight's.
const MAX_RANK: usize = 8;
/// Most entries of `__metadata__`, which nobody reads here.
const MAX_METADATA: usize = 1024;

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

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a tensor as elements of another type, row-major. Of the mapped file no more than a
    /// few megabytes are held meanwhile.
    ///
    /// # Errors
    ///
    /// There is no such tensor, it is not made of floats, or there is no memory for its values.
    pub fn values<T: Element>(&self, name: &str) -> Result<Vec<T>, LoadError> {
        let missing = || LoadError::MissingTensor { name: name.into() };
        let info = self.tensor_info(name).ok_or_else(missing)?;
        let (width, decode): (usize, fn(&[u8]) -> T) = match info.dtype {
            Dtype::F32 => (4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).elem()),
            Dtype::F16 => (2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32().elem()),
            Dtype::BF16 => (2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32().elem()),
            Dtype::F64 => (8, |b| {
                (f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32).elem()
            }),
            got => {
                let source = SafetensorsError::UnsupportedDtype { name: name.into(), got };
                return Err(LoadError::Safetensors { path: self.path.clone(), source });
            }
        };
        let (start, end) = info.data_offsets;
        let (start, end) = (self.data_start + start, self.data_start + end);
        let elements = (end - start) / width;
        let mut values = Vec::new();
        values
            .try_reserve_exact(elements)
            .map_err(|_| LoadError::OutOfMemory { name: name.into(), elements })?;
        values.resize(elements, 0f32.elem());
        for (index, values) in values.chunks_mut(WINDOW_VALUES).enumerate() {
            let from = start + index * WINDOW_VALUES * width;
            let window = from..from + values.len() * width;
            let bytes = &self.map[window.clone()];
            values.par_chunks_mut(TASK_VALUES).zip(bytes.par_chunks(TASK_VALUES * width)).for_each(
                |(values, bytes)| {
                    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(width)) {
                        *value = decode(bytes);
                    }
                },
            );
            files::release(&self.map, window);
        }
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
    #[serde(rename = "shape")]
    _shape: AtMost<MAX_RANK>,
    data_offsets: (u64, u64),
}

/// A list or object of at most `N` elements. Parsed, each takes many times the bytes of its text.
struct AtMost<const N: usize>;

impl<'de, const N: usize> Deserialize<'de> for AtMost<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de, const N: usize> Visitor<'de> for AtMost<N> {
    type Value = Self;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "at most {N} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
        for _ in 0..N {
            if list.next_element::<IgnoredAny>()?.is_none() {
                return Ok(self);
            }
        }
        match list.next_element::<IgnoredAny>()? {
            None => Ok(self),
            Some(_) => Err(A::Error::invalid_length(N + 1, &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        for _ in 0..N {
            if map.next_entry::<IgnoredAny, IgnoredAny>()?.is_none() {
                return Ok(self);
            }
        }
        match map.next_key::<IgnoredAny>()? {
            None => Ok(self),
            Some(_) => Err(A::Error::invalid_length(N + 1, &self)),
        }
    }
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
                        map.next_value::<AtMost<MAX_METADATA>>()?;
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
            let first = |name| file.values::<f32>(name).unwrap()[0];
            assert_eq!(["a", "b", "c", "d"].map(first), [1.5, -2.0, 3.0, 0.125]);
            let half = |name| file.values::<bf16>(name).unwrap()[0];
            assert_eq!(["a", "b", "c", "d"].map(half), [1.5, -2.0, 3.0, 0.125].map(bf16::from_f32));
            assert_eq!(file.tensor_info("d").unwrap().shape, [1, 1]);
        }
    }
}
