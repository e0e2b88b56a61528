//! What can be wrong with a GGUF container.

use super::metadata::MetadataError;

/// Why a GGUF file was refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum GgufError {
    /// The file does not start with `GGUF`.
    #[error("not a GGUF file: it starts with {got:?}, not \"GGUF\"")]
    BadMagic {
        /// First bytes of the file, up to four.
        got: Vec<u8>,
    },
    /// The file was written for big-endian machines.
    #[error("big-endian GGUF files are not supported")]
    BigEndian,
    /// A version other than 2 and 3.
    #[error("GGUF version {got} is not supported; supported: 2 and 3")]
    UnsupportedVersion {
        /// Version in the file.
        got: u32,
    },
    /// The file ends inside an item.
    #[error("truncated: {what} at byte {offset} needs {needed} bytes; {available} are left")]
    Truncated {
        /// Item being read.
        what: &'static str,
        /// Position in the file.
        offset: usize,
        /// Bytes that the item needs.
        needed: u64,
        /// Bytes left in the file.
        available: usize,
    },
    /// A count promises more items than the rest of the file can hold.
    #[error("{what} is {got}; the rest of the file holds at most {limit}")]
    CountTooLarge {
        /// Item counted.
        what: &'static str,
        /// Most items that fit.
        limit: u64,
        /// Count in the file.
        got: u64,
    },
    /// A string is not UTF-8.
    #[error("the string at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// Position in the file.
        offset: usize,
    },
    /// A boolean is neither 0 nor 1.
    #[error("the boolean at byte {offset} is {got}, neither 0 nor 1")]
    BadBool {
        /// Position in the file.
        offset: usize,
        /// Value in the file.
        got: u8,
    },
    /// A metadata value has a type that does not exist.
    #[error("metadata `{key}` has the unknown value type {got}; known: 0 to 12")]
    UnknownValueType {
        /// Key of the value.
        key: String,
        /// Type in the file.
        got: u32,
    },
    /// A metadata array holds arrays.
    #[error("metadata `{key}` is an array of arrays, which is not supported")]
    NestedArray {
        /// Key of the value.
        key: String,
    },
    /// Two metadata values share a key.
    #[error("metadata key `{key}` occurs twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// `general.alignment` has another type or is missing where it was expected.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The alignment is not a power of two, or out of range.
    #[error("alignment {got}; it must be a power of two of at most {limit}")]
    BadAlignment {
        /// Largest alignment accepted.
        limit: u64,
        /// Alignment in the file.
        got: u64,
    },
    /// Two tensors share a name.
    #[error("tensor `{name}` occurs twice")]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// A tensor has no dimension, or too many.
    #[error("tensor `{name}` has {got} dimensions; it must have 1 to {limit}")]
    BadRank {
        /// Tensor.
        name: String,
        /// Most dimensions accepted.
        limit: u32,
        /// Number of dimensions in the file.
        got: u32,
    },
    /// A tensor has a dimension of zero.
    #[error("tensor `{name}` has a dimension of 0")]
    ZeroDimension {
        /// Tensor.
        name: String,
    },
    /// The size of a tensor overflows.
    #[error("the size of tensor `{name}` overflows: dimensions {dimensions:?}")]
    SizeOverflow {
        /// Tensor.
        name: String,
        /// Dimensions in the file, innermost first.
        dimensions: Vec<u64>,
    },
    /// A tensor is stored in a type that cannot be decoded here.
    #[error("tensor `{name}` has type {got}; supported: {}", super::GgmlType::SUPPORTED)]
    UnsupportedType {
        /// Tensor.
        name: String,
        /// Name of the type, or its number where unknown.
        got: String,
    },
    /// The innermost dimension is not a whole number of quantisation blocks.
    #[error("tensor `{name}`: {got} values a row are not a multiple of the block size {block}")]
    PartialBlock {
        /// Tensor.
        name: String,
        /// Values of a block.
        block: usize,
        /// Values of a row.
        got: usize,
    },
    /// A tensor does not start at a multiple of the alignment.
    #[error("tensor `{name}` starts at {got}, not a multiple of the alignment {alignment}")]
    UnalignedOffset {
        /// Tensor.
        name: String,
        /// Alignment of the file.
        alignment: usize,
        /// Offset in the data section.
        got: u64,
    },
    /// A tensor reaches past the end of the file.
    #[error("tensor `{name}` needs {bytes} bytes at {offset}; the data section has {limit}")]
    PastEnd {
        /// Tensor.
        name: String,
        /// Offset in the data section.
        offset: u64,
        /// Bytes that it needs.
        bytes: usize,
        /// Bytes of the data section.
        limit: usize,
    },
    /// Two tensors share bytes.
    #[error("tensors `{first}` and `{second}` overlap")]
    Overlap {
        /// Tensor that starts first.
        first: String,
        /// Tensor that starts before the first one ends.
        second: String,
    },
}
