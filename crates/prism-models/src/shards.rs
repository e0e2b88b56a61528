//! Weights in one safetensors file, or in several under an index that says which tensor lies where.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path};

use burn::tensor::Element;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::LoadError;
use crate::files;
use crate::safetensors_file::SafetensorsFile;

/// Largest index that is read, in bytes; that of a model of 700 billion weights has 9 MB.
const MAX_INDEX_BYTES: u64 = 32 << 20;
/// Most files of one model.
const MAX_SHARDS: usize = 1024;

/// Why the index of weights in several files was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The text is not JSON of the expected form, or names a tensor twice.
    #[error("the index is malformed: {0}")]
    Json(#[from] serde_json::Error),
    /// A file that would lie elsewhere than beside the index.
    #[error(
        "tensor `{tensor}` is said to be in {file:?}; shards lie in the directory of the index"
    )]
    Escapes {
        /// Tensor.
        tensor: String,
        /// File in the index.
        file: String,
    },
    /// More files than any model has.
    #[error("the index names {got} files; the limit is {limit}")]
    TooManyShards {
        /// Most files accepted.
        limit: usize,
        /// Files named.
        got: usize,
    },
    /// A file of the index does not exist.
    #[error("shard {file} is missing")]
    MissingShard {
        /// File in the index.
        file: String,
    },
    /// A shard lacks a tensor that the index puts there.
    #[error("tensor `{tensor}` is not in {file}, where the index puts it")]
    NotInShard {
        /// Tensor.
        tensor: String,
        /// File in the index.
        file: String,
    },
    /// A shard holds a tensor that the index doesn't know.
    #[error("{file} holds tensor `{tensor}`, which the index lacks")]
    NotInIndex {
        /// Tensor.
        tensor: String,
        /// File that holds it.
        file: String,
    },
    /// A tensor lies in two shards.
    #[error("tensor `{tensor}` is in {first} and in {second}")]
    Twice {
        /// Tensor.
        tensor: String,
        /// File in the index.
        first: String,
        /// The other file that holds it.
        second: String,
    },
}

/// The weights of a model, mapped.
#[derive(Debug)]
pub struct Shards {
    files: Vec<SafetensorsFile>,
    /// Which of the files holds a tensor.
    file_of: BTreeMap<String, usize>,
}

impl Shards {
    /// One file with all weights.
    ///
    /// # Errors
    ///
    /// The file is refused.
    pub fn single(path: &Path) -> Result<Self, LoadError> {
        let file = SafetensorsFile::open(path)?;
        let file_of = file.tensor_names().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { files: vec![file], file_of })
    }

    /// The files of an index, all in `dir`. They may be links to anywhere, as in the hub's cache:
    /// whoever fills the directory decides what its names mean, the index doesn't.
    ///
    /// # Errors
    ///
    /// The index or a shard is refused, or the shards together don't hold exactly the tensors of
    /// the index, each where it says.
    pub fn indexed(dir: &Path, index: &Path) -> Result<Self, LoadError> {
        let refused = |source| LoadError::Index { path: index.into(), source };
        let json = files::read(index, MAX_INDEX_BYTES)?;
        let Index { weight_map: WeightMap(weight_map) } =
            serde_json::from_slice(&json).map_err(|error| refused(error.into()))?;
        let names = shard_names(&weight_map).map_err(refused)?;
        let mut opened = Vec::with_capacity(names.len());
        for name in &names {
            let path = dir.join(name);
            if !path.try_exists().map_err(|source| files::io(&path, source))? {
                return Err(refused(IndexError::MissingShard { file: name.clone() }));
            }
            opened.push(SafetensorsFile::open(&path)?);
        }
        let file_of = place(&weight_map, &names, &opened).map_err(refused)?;
        Ok(Self { files: opened, file_of })
    }

    /// The names of the tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Row-major shape and type of a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.file(name)?.tensor_info(name)
    }

    /// Reads a tensor as elements of another type, row-major.
    ///
    /// # Errors
    ///
    /// Those of [`SafetensorsFile::values`].
    pub fn values<T: Element>(&self, name: &str) -> Result<Vec<T>, LoadError> {
        let missing = || LoadError::MissingTensor { name: name.into() };
        self.file(name).ok_or_else(missing)?.values(name)
    }

    fn file(&self, name: &str) -> Option<&SafetensorsFile> {
        self.files.get(*self.file_of.get(name)?)
    }
}

/// The files that an index names, sorted.
fn shard_names(weight_map: &BTreeMap<String, String>) -> Result<Vec<String>, IndexError> {
    let mut names = BTreeSet::new();
    for (tensor, file) in weight_map {
        let mut components = Path::new(file).components();
        let one = matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == file.as_str());
        // Elsewhere a backslash may be a separator.
        if !one || file.contains(['\\', '\0']) {
            let (tensor, file) = (tensor.clone(), file.clone());
            return Err(IndexError::Escapes { tensor, file });
        }
        names.insert(file.as_str());
    }
    if names.len() > MAX_SHARDS {
        return Err(IndexError::TooManyShards { limit: MAX_SHARDS, got: names.len() });
    }
    Ok(names.into_iter().map(String::from).collect())
}

/// Which file holds each tensor, once the index and the files say the same.
fn place(
    weight_map: &BTreeMap<String, String>,
    names: &[String],
    opened: &[SafetensorsFile],
) -> Result<BTreeMap<String, usize>, IndexError> {
    let mut file_of = BTreeMap::new();
    for (index, (file, shard)) in names.iter().zip(opened).enumerate() {
        for tensor in shard.tensor_names() {
            match weight_map.get(&tensor) {
                Some(right) if right == file => {
                    file_of.insert(tensor, index);
                }
                Some(right) => {
                    let right_shard = names.iter().position(|name| name == right);
                    let twice = right_shard
                        .and_then(|right| opened.get(right))
                        .is_some_and(|shard| shard.tensor_info(&tensor).is_some());
                    let (first, second) = (right.clone(), file.clone());
                    return Err(if twice {
                        IndexError::Twice { tensor, first, second }
                    } else {
                        IndexError::NotInShard { tensor, file: first }
                    });
                }
                None => return Err(IndexError::NotInIndex { tensor, file: file.clone() }),
            }
        }
    }
    match weight_map.iter().find(|(tensor, _)| !file_of.contains_key(*tensor)) {
        None => Ok(file_of),
        Some((tensor, file)) => {
            Err(IndexError::NotInShard { tensor: tensor.clone(), file: file.clone() })
        }
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Files by tensor. A derived map would keep the last of two entries of one name.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    if entries.contains_key(&tensor) {
                        return Err(A::Error::custom(format!("`{tensor}` occurs twice")));
                    }
                    entries.insert(tensor, file);
                }
                Ok(WeightMap(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}
