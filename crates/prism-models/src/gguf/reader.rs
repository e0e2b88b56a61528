//! A bounds-checked cursor over the little-endian bytes of a GGUF file.

use super::error::GgufError;

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// Takes `length` bytes, if the file still has them.
    pub fn take(&mut self, length: u64, what: &'static str) -> Result<&'a [u8], GgufError> {
        let available = self.remaining();
        match usize::try_from(length) {
            Ok(length) if length <= available => {
                let start = self.position;
                self.position += length;
                Ok(&self.bytes[start..self.position])
            }
            _ => {
                let offset = self.position;
                Err(GgufError::Truncated { what, offset, needed: length, available })
            }
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Reads a count of items of at least `smallest` bytes each, and refuses one that the rest of
    /// the file cannot hold, before anything is allocated for it.
    pub fn count(&mut self, smallest: u64, what: &'static str) -> Result<u64, GgufError> {
        let got = self.u64(what)?;
        self.check_count(got, smallest, what)?;
        Ok(got)
    }

    /// The check of [`Reader::count`] for a count that was read before.
    pub fn check_count(
        &self,
        got: u64,
        smallest: u64,
        what: &'static str,
    ) -> Result<(), GgufError> {
        let limit = self.remaining() as u64 / smallest;
        if got > limit {
            return Err(GgufError::CountTooLarge { what, limit, got });
        }
        Ok(())
    }

    pub fn string(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        let offset = self.position;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|_| GgufError::NotUtf8 { offset })
    }
}
