//! A block selection on a device.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use prism_core::error::{PrismError, Result};
use prism_core::selection::{WORD_BITS, extent};
use prism_core::{AttentionShape, BlockGrid, BlockSelection, SequenceLengths};

use crate::check;

/// Which key blocks each query block reads, on the device of the attention.
///
/// Words are `[batch, q_heads, rows, ceil(key_blocks / 32)]` i32, counts
/// `[batch, q_heads, rows]` i32, as [`BlockSelection`] describes.
#[derive(Debug, Clone)]
pub struct SelectedBlocks {
    pub(crate) words: Tensor<4, Int>,
    pub(crate) counts: Tensor<3, Int>,
    pub(crate) grids: Vec<BlockGrid>,
}

impl SelectedBlocks {
    /// Brings a selection of one's own to `device`, for attention of `shape` in blocks of `block`.
    ///
    /// # Errors
    /// Bad lengths or block size; a selection that breaks an invariant: another shape, a row that
    /// reads nothing, a block past the row's diagonal.
    pub fn from_host(
        selection: &BlockSelection,
        shape: &AttentionShape,
        block: usize,
        lengths: Option<&SequenceLengths>,
        device: &Device,
    ) -> Result<Self> {
        let grids = check::grids(block, shape, lengths)?;
        selection.validate(&grids, shape.q_heads)?;
        let [batch, heads, rows, _] = selection.shape();
        let signed = |values: &[u32]| values.iter().map(|&x| x as i32).collect::<Vec<_>>();
        let words = TensorData::new(
            signed(selection.words()),
            [batch, heads, rows, selection.words_per_row()],
        );
        let counts = TensorData::new(signed(selection.counts()), [batch, heads, rows]);
        Ok(Self {
            words: Tensor::from_data(words, (device, DType::I32)),
            counts: Tensor::from_data(counts, (device, DType::I32)),
            grids,
        })
    }

    /// Reads the selection back.
    ///
    /// # Errors
    /// The device failed, or what it holds is no selection.
    pub fn to_host(&self) -> Result<BlockSelection> {
        let [batch, heads, ..] = self.words.dims();
        let (rows, key_blocks) = extent(&self.grids);
        BlockSelection::from_words(
            [batch, heads, rows, key_blocks],
            read(self.words.clone())?,
            read(self.counts.clone())?,
        )
    }

    /// Block grid of each sequence.
    pub fn grids(&self) -> &[BlockGrid] {
        &self.grids
    }

    /// Selected over causal blocks of the whole batch. Waits for the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn density(&self) -> Result<f64> {
        Ok(self.to_host()?.density(&self.grids))
    }

    /// [`density`](Self::density) of each (batch, head), batch-major. Waits for the device.
    ///
    /// # Errors
    /// The device failed.
    pub fn density_by_head(&self) -> Result<Vec<f64>> {
        Ok(self.to_host()?.density_by_head(&self.grids))
    }

    /// Words of one row.
    pub(crate) fn words_per_row(grids: &[BlockGrid]) -> usize {
        extent(grids).1.div_ceil(WORD_BITS)
    }
}

fn read<const D: usize>(tensor: Tensor<D, Int>) -> Result<Vec<u32>> {
    let failed = |reason: String| PrismError::Read { reason };
    let data = tensor.try_into_data_dtype(DType::I32).map_err(|error| failed(error.to_string()))?;
    let values = data.try_into_vec::<i32>().map_err(|error| failed(format!("{error:?}")))?;
    Ok(values.into_iter().map(|x| x as u32).collect())
}
