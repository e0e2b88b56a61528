//! Building files byte by byte.

use std::path::PathBuf;

use tempfile::TempDir;

/// A file in a directory that is removed with it.
pub struct TestFile {
    pub path: PathBuf,
    _directory: TempDir,
}

pub fn file(name: &str, bytes: &[u8]) -> TestFile {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    TestFile { path, _directory: directory }
}

/// A safetensors file of this header and this many bytes of zeros.
pub fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A tensor entry of a GGUF header.
pub struct Tensor {
    pub name: &'static str,
    pub dimensions: Vec<u64>,
    pub kind: u32,
    pub offset: u64,
}

/// A GGUF file to be, valid as long as nobody changes it.
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
    pub pairs: Vec<Vec<u8>>,
    pub tensors: Vec<Tensor>,
    pub data: usize,
}

impl Gguf {
    pub fn new() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            pair_count: None,
            pairs: vec![],
            tensors: vec![],
            data: 256,
        }
    }

    pub fn tensor(mut self, name: &'static str, dimensions: &[u64], kind: u32, at: u64) -> Self {
        self.tensors.push(Tensor { name, dimensions: dimensions.to_vec(), kind, offset: at });
        self
    }

    pub fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.pairs.push([&string(key), &kind.to_le_bytes()[..], value].concat());
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.pair(key, 4, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.pair(key, 6, &value.to_le_bytes())
    }

    pub fn str(self, key: &str, value: &str) -> Self {
        let value = string(value);
        self.pair(key, 8, &value)
    }

    pub fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| bytes.extend(string(value)));
        self.pair(key, 9, &bytes)
    }

    pub fn header(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        let tensors = self.tensor_count.unwrap_or(self.tensors.len() as u64);
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        self.pairs.iter().for_each(|pair| bytes.extend(pair));
        for tensor in &self.tensors {
            bytes.extend(string(tensor.name));
            bytes.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.to_le_bytes());
        }
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        bytes
    }
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}
