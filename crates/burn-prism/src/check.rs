//! What every call checks before it computes.

use burn::tensor::{DType, Device, Tensor};
use prism_core::error::{PrismError, Result};
use prism_core::{AttentionShape, BlockGrid, SelectorConfig, SequenceLengths, masses};

use crate::config::PrismConfig;

/// Checks Q, K and V against each other: shapes, element types, devices.
pub(crate) fn inputs(q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>) -> Result<AttentionShape> {
    let shape = AttentionShape::new(q.dims(), k.dims(), v.dims())?;
    element("q", q.dtype())?;
    for (what, dtype) in [("k", k.dtype()), ("v", v.dtype())] {
        if dtype != q.dtype() {
            let got = format!("{dtype:?}");
            return Err(PrismError::DType { what, allowed: "the element type of q", got });
        }
    }
    for (right, tensor) in [("k", k), ("v", v)] {
        if tensor.device() != q.device() {
            return Err(PrismError::Device { left: "q", right });
        }
    }
    Ok(shape)
}

/// Checks that attention can work on an element type.
pub(crate) fn element(what: &'static str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        got => {
            Err(PrismError::DType { what, allowed: "f32, f16 or bf16", got: format!("{got:?}") })
        }
    }
}

/// The block grid of each sequence.
pub(crate) fn grids(
    block: usize,
    shape: &AttentionShape,
    lengths: Option<&SequenceLengths>,
) -> Result<Vec<BlockGrid>> {
    SequenceLengths::resolve(lengths, shape)?
        .into_iter()
        .map(|(q_len, kv_len)| BlockGrid::new(block, q_len, kv_len))
        .collect()
}

/// Checks that a row of `keys` keys has masses under settings that are valid themselves.
pub(crate) fn selectable(config: &PrismConfig, keys: usize) -> Result<()> {
    masses::check_row(match &config.selector {
        Some(SelectorConfig::Prism(options)) => {
            keys.div_ceil(options.pool_block.unwrap_or(config.block))
        }
        Some(_) => keys.div_ceil(config.block),
        None => config.scoring.row_blocks(config.block, keys),
    })
}

/// Checks that a device has an element type.
pub(crate) fn supported(dtype: DType, device: &Device) -> Result<()> {
    if device.supports_dtype(dtype) {
        Ok(())
    } else {
        let got = format!("{dtype:?}");
        Err(PrismError::DType { what: "q", allowed: "a type that the device has", got })
    }
}
