//! Which dims belong to which band, as bits that a kernel is compiled for.

use prism_core::bands::Bands;

/// Largest head_dim.
pub const MAX_HEAD_DIM: usize = 256;
const WORDS: usize = MAX_HEAD_DIM / 32;

/// Bit c of a band says that it holds dim c.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BandMask {
    /// Fast dims.
    pub high: [u32; WORDS],
    /// Slow dims.
    pub low: [u32; WORDS],
}

impl BandMask {
    /// The masks of `bands`, whose head_dim is at most [`MAX_HEAD_DIM`].
    pub fn new(bands: &Bands) -> Self {
        let mask = |dims: &[usize]| {
            let mut words = [0u32; WORDS];
            dims.iter().for_each(|&c| words[c / 32] |= 1 << (c % 32));
            words
        };
        Self { high: mask(bands.high()), low: mask(bands.low()) }
    }

    /// The words of band `z`: 0 is high, 1 is low.
    pub fn band(&self, z: usize) -> &[u32; WORDS] {
        if z == 0 { &self.high } else { &self.low }
    }

    /// Dims of band `z`.
    pub fn width(&self, z: usize) -> u32 {
        self.band(z).iter().map(|word| word.count_ones()).sum()
    }

    /// Whether band `z` holds any of the dims `start..start + len`.
    pub fn touches(&self, z: usize, start: usize, len: usize) -> bool {
        (start..start + len).any(|c| self.band(z)[c / 32] >> (c % 32) & 1 == 1)
    }

    /// Runs of vectors of `width` dims of a head of `dim` that touch the same bands: first, end,
    /// and whether they touch each.
    pub fn segments(&self, dim: usize, width: usize) -> Vec<(usize, usize, [bool; 2])> {
        let touched = |c: usize| [0, 1].map(|z| self.touches(z, c * width, width));
        let chunks: Vec<usize> = (0..dim / width).collect();
        chunks
            .chunk_by(|&a, &b| touched(a) == touched(b))
            .map(|run| (run[0], run[run.len() - 1] + 1, touched(run[0])))
            .collect()
    }

    /// Bands that hold dims, by index.
    pub fn present(&self) -> Vec<usize> {
        (0..2).filter(|&z| self.width(z) > 0).collect()
    }
}
