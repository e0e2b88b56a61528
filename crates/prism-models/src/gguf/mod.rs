//! Reading GGUF files, versions 2 and 3, little-endian.
//!
//! A file is mapped and its header validated as a whole: when [`GgufFile::open`] succeeds, every
//! tensor lies inside the file, and decoding one cannot fail for want of bytes.

mod dequant;
mod dequant_k;
mod error;
mod ggml_type;
mod metadata;
mod reader;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

pub use error::GgufError;
pub use ggml_type::GgmlType;
pub use metadata::{Metadata, MetadataError};
use reader::Reader;

use crate::error::LoadError;
use crate::files;

/// Alignment of tensors where the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Larger than any page size; more would only make the padding absurd.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// The format's own limit on the dimensions of a tensor.
const MAX_RANK: u32 = 4;
/// Bytes of the smallest metadata pair: an empty key, a type and one byte.
const MIN_PAIR_BYTES: u64 = 8 + 4 + 1;
/// Bytes of the smallest tensor entry: an empty name, one dimension, type and offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Where and how a tensor is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Row-major shape, outermost dimension first (the reverse of the order in the file).
    pub shape: Vec<usize>,
    /// Storage type.
    pub kind: GgmlType,
    /// Bytes of the tensor within the file.
    range: Range<usize>,
}

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    contents: Contents,
}

#[derive(Debug)]
struct Contents {
    metadata: Metadata,
    tensors: BTreeMap<String, TensorInfo>,
}

impl GgufFile {
    /// Maps a file and validates its header.
    ///
    /// # Errors
    ///
    /// The path is not a readable, regular, non-empty file, or its contents are malformed
    /// ([`GgufError`]).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref().to_path_buf();
        let map = files::map(&path)?;
        match parse(&map) {
            Ok(contents) => Ok(Self { path, map, contents }),
            Err(source) => Err(LoadError::Gguf { path, source }),
        }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The key-value section.
    pub fn metadata(&self) -> &Metadata {
        &self.contents.metadata
    }

    /// The names of the tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.contents.tensors.keys().map(String::as_str)
    }

    /// Shape and type of a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.contents.tensors.get(name)
    }

    /// Decodes a tensor to 32-bit floats, row-major.
    ///
    /// # Errors
    ///
    /// There is no such tensor, or no memory for its values.
    pub fn dequantise(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let missing = || LoadError::MissingTensor { name: name.into() };
        let info = self.tensor_info(name).ok_or_else(missing)?;
        let elements = info.shape.iter().product();
        let mut values = Vec::new();
        values
            .try_reserve_exact(elements)
            .map_err(|_| LoadError::OutOfMemory { name: name.into(), elements })?;
        values.resize(elements, 0.0);
        dequant::dequantise(info.kind, &self.map[info.range.clone()], &mut values);
        files::release(&self.map, info.range.clone());
        Ok(values)
    }
}

fn parse(bytes: &[u8]) -> Result<Contents, GgufError> {
    let mut reader = Reader::new(bytes);
    check_magic(bytes, &mut reader)?;
    let tensors = reader.u64("tensor count")?;
    let pairs = reader.count(MIN_PAIR_BYTES, "metadata count")?;
    reader.check_count(tensors, MIN_TENSOR_BYTES, "tensor count")?;
    let metadata = Metadata::read(&mut reader, pairs)?;

    let alignment = metadata.find_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(GgufError::BadAlignment { limit: MAX_ALIGNMENT, got: alignment });
    }
    reader.check_count(tensors, MIN_TENSOR_BYTES, "tensor count")?;
    // Growing would ask for twice as much; the count is known to fit the file.
    let mut entries = Vec::with_capacity(tensors as usize);
    for _ in 0..tensors {
        entries.push(Entry::read(&mut reader)?);
    }
    // The data of a file without tensors may be missing, and its padding too.
    let start = reader.position().next_multiple_of(alignment as usize).min(bytes.len());
    let tensors = place(entries, start..bytes.len(), alignment as usize)?;
    Ok(Contents { metadata, tensors })
}

fn check_magic(bytes: &[u8], reader: &mut Reader<'_>) -> Result<(), GgufError> {
    if !bytes.starts_with(b"GGUF") {
        return Err(GgufError::BadMagic { got: bytes[..bytes.len().min(4)].to_vec() });
    }
    reader.take(4, "magic")?;
    match reader.u32("version")? {
        2 | 3 => Ok(()),
        got if matches!(got.swap_bytes(), 1..=3) => Err(GgufError::BigEndian),
        got => Err(GgufError::UnsupportedVersion { got }),
    }
}

/// A tensor entry of the header.
struct Entry {
    name: String,
    shape: Vec<usize>,
    kind: GgmlType,
    offset: u64,
    bytes: usize,
}

impl Entry {
    fn read(reader: &mut Reader<'_>) -> Result<Self, GgufError> {
        let name = reader.string("tensor name")?.to_owned();
        let rank = reader.u32("tensor rank")?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(GgufError::BadRank { name, limit: MAX_RANK, got: rank });
        }
        let dimensions =
            (0..rank).map(|_| reader.u64("tensor dimension")).collect::<Result<Vec<_>, _>>()?;
        let kind = GgmlType::from_id(reader.u32("tensor type")?);
        let offset = reader.u64("tensor offset")?;
        let kind = match kind {
            Ok(kind) => kind,
            Err(got) => return Err(GgufError::UnsupportedType { name, got }),
        };
        if dimensions.contains(&0) {
            return Err(GgufError::ZeroDimension { name });
        }
        let Some((mut shape, bytes)) = sizes(&dimensions, kind) else {
            return Err(GgufError::SizeOverflow { name, dimensions });
        };
        let (block, row) = (kind.block_weights(), shape[0]);
        if row % block != 0 {
            return Err(GgufError::PartialBlock { name, block, got: row });
        }
        shape.reverse();
        Ok(Self { name, shape, kind, offset, bytes })
    }
}

/// The dimensions as sizes, and the bytes that they need; `None` on overflow.
fn sizes(dimensions: &[u64], kind: GgmlType) -> Option<(Vec<usize>, usize)> {
    let sizes = dimensions
        .iter()
        .map(|&dimension| usize::try_from(dimension).ok())
        .collect::<Option<Vec<_>>>()?;
    let elements = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size))?;
    // The decoded values must be addressable too.
    elements.checked_mul(size_of::<f32>()).filter(|&bytes| isize::try_from(bytes).is_ok())?;
    Some((sizes, (elements / kind.block_weights()).checked_mul(kind.block_bytes())?))
}

/// Places the entries in the data section, and refuses those that do not fit into it.
fn place(
    mut entries: Vec<Entry>,
    data: Range<usize>,
    alignment: usize,
) -> Result<BTreeMap<String, TensorInfo>, GgufError> {
    entries.sort_by_key(|entry| entry.offset);
    let mut tensors = BTreeMap::new();
    let mut previous: Option<(String, usize)> = None;
    for Entry { name, shape, kind, offset, bytes } in entries {
        if offset % alignment as u64 != 0 {
            return Err(GgufError::UnalignedOffset { name, alignment, got: offset });
        }
        let start = usize::try_from(offset).ok().and_then(|offset| data.start.checked_add(offset));
        let range = start.and_then(|start| Some(start..start.checked_add(bytes)?));
        let Some(range) = range.filter(|range| range.end <= data.end) else {
            return Err(GgufError::PastEnd { name, offset, bytes, limit: data.len() });
        };
        if tensors.contains_key(&name) {
            return Err(GgufError::DuplicateTensor { name });
        }
        if let Some((first, end)) = previous
            && range.start < end
        {
            return Err(GgufError::Overlap { first, second: name });
        }
        previous = Some((name.clone(), range.end));
        tensors.insert(name, TensorInfo { shape, kind, range });
    }
    Ok(tensors)
}
