//! The errors of opening and reading a model's files.

use std::path::PathBuf;

use burn::tensor::DType;

use crate::config::SUPPORTED_ARCHITECTURES;
use crate::gguf::GgufError;
use crate::safetensors_file::SafetensorsError;
use crate::shards::IndexError;
use crate::template::TemplateError;
use crate::tokenizer::TokenizerError;

/// Why a model's files could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The operating system refused (missing, no permission, a loop of links, …).
    #[error("cannot read {path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A directory, FIFO, socket or device stands where a regular file is needed.
    #[error("{path} is a {kind}, not a regular file")]
    NotRegularFile {
        /// What was to be read.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file has no bytes.
    #[error("{path} is empty")]
    EmptyFile {
        /// File.
        path: PathBuf,
    },
    /// The file is the small text that Git LFS leaves where the data was not downloaded.
    #[error("{path} is a Git LFS pointer, not the data; run `git lfs pull` where it came from")]
    LfsPointer {
        /// File.
        path: PathBuf,
    },
    /// A file that is read whole is larger than such a file can sensibly be.
    #[error("{path} has {got} bytes; the limit is {limit}")]
    FileTooLarge {
        /// File.
        path: PathBuf,
        /// Most bytes accepted.
        limit: u64,
        /// Bytes of the file.
        got: u64,
    },
    /// A model directory lacks a file.
    #[error("{dir} holds no {name}")]
    MissingFile {
        /// Directory.
        dir: PathBuf,
        /// File name looked for.
        name: &'static str,
    },
    /// The index of weights in several files is malformed, or the files are not as it says.
    #[error("{path}: {source}")]
    Index {
        /// Index of the shards.
        path: PathBuf,
        /// What is wrong with it.
        source: IndexError,
    },
    /// The GGUF container is malformed or uses something unsupported.
    #[error("{path}: {source}")]
    Gguf {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        source: GgufError,
    },
    /// The safetensors container is malformed or uses something unsupported.
    #[error("{path}: {source}")]
    Safetensors {
        /// File.
        path: PathBuf,
        /// What is wrong with it.
        source: SafetensorsError,
    },
    /// The model configuration is invalid or unsupported.
    #[error("{path}: {source}")]
    Config {
        /// File that holds the configuration.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The tokenizer is invalid or unsupported.
    #[error("{path}: {source}")]
    Tokenizer {
        /// File that holds the tokenizer.
        path: PathBuf,
        /// What is wrong with it.
        source: TokenizerError,
    },
    /// The chat template is invalid.
    #[error("{path}: {source}")]
    Template {
        /// File that holds the template.
        path: PathBuf,
        /// What is wrong with it.
        source: TemplateError,
    },
    /// The checkpoint has no tensor of this name.
    #[error("the checkpoint has no tensor `{name}`")]
    MissingTensor {
        /// Canonical name.
        name: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("tensor `{name}` has shape {got:?}; expected {expected:?}")]
    WrongShape {
        /// Canonical name.
        name: String,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
        /// Shape in the file.
        got: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{name}` holds {value} at flat index {index}")]
    NonFiniteWeight {
        /// Canonical name.
        name: String,
        /// Row-major position.
        index: usize,
        /// The value there.
        value: f32,
    },
    /// A weight is too large for the element type of the model.
    #[error("tensor `{name}` holds {value} at flat index {index}; {dtype:?} ends at {limit}")]
    WeightOverflow {
        /// Canonical name.
        name: String,
        /// Row-major position.
        index: usize,
        /// The value there.
        value: f32,
        /// Type asked for.
        dtype: DType,
        /// Largest value of that type.
        limit: f32,
    },
    /// Weights can't be had in this type.
    #[error("weights of type {got:?} are not supported; supported: F32, F16, BF16")]
    WeightType {
        /// Type asked for.
        got: DType,
    },
    /// The decoded tensor does not fit into memory.
    #[error("no memory for the {elements} values of tensor `{name}`")]
    OutOfMemory {
        /// Tensor.
        name: String,
        /// Number of values asked for.
        elements: usize,
    },
}

/// For messages.
const SUPPORTED_ROPES: &str = "default, linear, dynamic, llama3, yarn";

/// Why a model configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A name that stands for no known model.
    #[error("no shape {name:?}; there are {known}")]
    UnknownShape {
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The text is not JSON.
    #[error("invalid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The JSON document is not an object.
    #[error("the configuration is not a JSON object")]
    NotAnObject,
    /// A required field is absent or null.
    #[error("field `{field}` is missing")]
    Missing {
        /// Name of the field.
        field: &'static str,
    },
    /// A field has another type.
    #[error("field `{field}` is not {expected}")]
    WrongType {
        /// Name of the field.
        field: String,
        /// Type needed.
        expected: &'static str,
    },
    /// A number is outside its range.
    #[error("field `{field}` is {got}; it must be {allowed}")]
    OutOfRange {
        /// Name of the field.
        field: String,
        /// Range accepted, in words.
        allowed: String,
        /// Value in the file.
        got: String,
    },
    /// One size does not divide another.
    #[error("`{field}` = {got} is not a multiple of `{divisor_field}` = {divisor}")]
    NotDivisible {
        /// Field that must be a multiple.
        field: &'static str,
        /// Its value.
        got: usize,
        /// Field that must divide it.
        divisor_field: &'static str,
        /// Its value.
        divisor: usize,
    },
    /// Rotary embeddings turn channels in pairs, so that the head dimension must be even.
    #[error("head_dim = {got} is odd; rotary embeddings need an even one")]
    OddHeadDim {
        /// Value in the file.
        got: usize,
    },
    /// Another model family.
    #[error("architecture {got} is not supported; supported: {SUPPORTED_ARCHITECTURES}")]
    UnsupportedArchitecture {
        /// Architecture in the file.
        got: String,
    },
    /// Another rotary scaling.
    #[error("rope type {got} is not supported; supported: {SUPPORTED_ROPES}")]
    UnsupportedRope {
        /// Rope type in the file.
        got: String,
    },
    /// A setting of the rotary scaling that its type doesn't have.
    #[error("rope type {rope_type} has no setting `{field}`; it would be without effect")]
    RopeSetting {
        /// Name of the setting.
        field: String,
        /// Rope type in the file.
        rope_type: String,
    },
    /// Any other setting that this crate does not implement.
    #[error("`{field}` = {got} is not supported; supported: {supported}")]
    Unsupported {
        /// Name of the field.
        field: &'static str,
        /// Value in the file.
        got: String,
        /// What would be accepted.
        supported: &'static str,
    },
    /// Any other setting of a GGUF file that this crate does not implement.
    #[error("`{field}` = {got} is not supported; supported: {supported}")]
    UnsupportedMetadata {
        /// Key of the metadata.
        field: String,
        /// Value in the file.
        got: String,
        /// What would be accepted.
        supported: &'static str,
    },
    /// A GGUF metadata value is missing or has another type.
    #[error(transparent)]
    Metadata(#[from] crate::gguf::MetadataError),
}
