//! The order of columns in the weight of a product with SwiGLU.
//!
//! A thread's accumulators hold, of every 8 columns, the same two. So groups of 8 columns of the gate
//! and the up projection alternate: what belongs together is in one thread, and its results are just
//! the accumulators of 8 columns of the output.

use cubecl::prelude::*;

use super::check::check_lines;
use super::matrix::Layout;
use super::{MatmulError, Matrix};
use crate::operand::{Element, buffer};
use crate::work::{cube_count, launch};

/// Neighbouring columns of one projection.
pub const INTERLEAVE: usize = 8;

/// One of the two projections of a SwiGLU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// What goes through silu.
    Gate,
    /// What that is multiplied by.
    Up,
}

/// Which projection, and which of its columns, is at `column` of the weight.
pub fn interleaved(column: usize) -> (Half, usize) {
    let (group, within) = (column / INTERLEAVE, column % INTERLEAVE);
    let half = if group % 2 == 0 { Half::Gate } else { Half::Up };
    (half, group / 2 * INTERLEAVE + within)
}

/// The weight `[K, 2F]` of a product with [`Epilogue::SwiGlu`](super::Epilogue::SwiGlu), from a gate and
/// an up projection `[K, F]`, both row-major or both column-major; it is so too, without gaps. On any
/// runtime.
///
/// # Errors
/// Unless K and F are multiples of 8, elements are of 16 bits, and both have the same shape and order.
pub fn interleave(client: &Client, gate: &Matrix, up: &Matrix) -> Result<Matrix, MatmulError> {
    let ([k, f], element) = (gate.shape, gate.element);
    if element == Element::F32 {
        return Err(MatmulError::Element(element));
    }
    if up.shape != gate.shape {
        return Err(MatmulError::Shape { operand: "up", got: up.shape, expected: gate.shape });
    }
    for (extent, got) in [("K", k), ("F", f)] {
        if got == 0 || got > i32::MAX as usize {
            return Err(MatmulError::Range { extent, got });
        }
        if got % INTERLEAVE != 0 {
            return Err(MatmulError::Multiple { extent, multiple: INTERLEAVE, got });
        }
    }
    let Some(layout) = gate.layout() else {
        let order = "row-major or column-major";
        return Err(MatmulError::Order { operand: "gate", order, got: gate.strides });
    };
    if up.layout() != Some(layout) {
        let order = if layout == Layout::RowMajor { "row-major" } else { "column-major" };
        return Err(MatmulError::Order { operand: "up", order, got: up.strides });
    }
    check_lines("gate", gate, element)?;
    check_lines("up", up, element)?;

    let handle = client.empty(2 * k * f * element.size());
    let out = match layout {
        Layout::RowMajor => Matrix::row_major(handle, [k, 2 * f], element),
        Layout::ColumnMajor => Matrix::column_major(handle, [k, 2 * f], element),
    };
    let (lines, length, _) = out.lines();
    let eights = lines * (length / INTERLEAVE);
    let units = 256u32.min(client.properties().hardware.max_units_per_cube);
    let strides = [gate, up].map(|matrix| matrix.lines().2 / INTERLEAVE);
    let spans = [gate, up].map(|matrix| matrix.span() / INTERLEAVE);
    // SAFETY: units past the end return; every other reads and writes within both shapes.
    unsafe {
        launch!(
            interleave_kernel,
            client,
            cube_count(client, eights.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            cubecl::ir::AddressType::from_len(eights.max(spans[0]).max(spans[1])),
            buffer(&gate.handle, spans[0]),
            buffer(&up.handle, spans[1]),
            buffer(&out.handle, eights),
            length / INTERLEAVE,
            strides[0],
            strides[1],
            eights,
            layout == Layout::RowMajor,
        );
    }
    Ok(out)
}

/// In eights of elements. `width`: of a line of `out`; `along`: whether the columns of the weight
/// run along a line.
#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn interleave_kernel(
    gate: &[Vector<u32, Const<4>>],
    up: &[Vector<u32, Const<4>>],
    out: &mut [Vector<u32, Const<4>>],
    width: usize,
    gate_stride: usize,
    up_stride: usize,
    eights: usize,
    #[comptime] along: bool,
) {
    let at = ABSOLUTE_POS;
    if at < eights {
        let (line, eight) = (at / width, at % width);
        let mut group = line / 8;
        let mut source_line = line / 16 * 8 + line % 8;
        let mut source_eight = eight;
        if comptime!(along) {
            group = eight;
            source_line = line;
            source_eight = eight / 2;
        }
        if group % 2 == 0 {
            out[at] = gate[source_line * gate_stride + source_eight];
        } else {
            out[at] = up[source_line * up_stride + source_eight];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_of_both_halves_comes_once_in_groups_of_eight() {
        let mut columns: Vec<_> = (0..64).map(interleaved).collect();
        assert_eq!(columns[7], (Half::Gate, 7));
        assert_eq!(columns[8], (Half::Up, 0));
        assert_eq!(columns[16], (Half::Gate, 8));
        columns.sort_by_key(|&(half, column)| (half == Half::Up, column));
        let expected = [Half::Gate, Half::Up].map(|half| (0..32).map(move |c| (half, c)));
        assert_eq!(columns, expected.into_iter().flatten().collect::<Vec<_>>());
    }
}
