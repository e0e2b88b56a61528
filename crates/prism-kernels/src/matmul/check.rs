//! Which products the kernel computes.

use thiserror::Error;

use super::matrix::{Layout, Matrix};
use super::{Epilogue, INTERLEAVE, MatmulProblem, launch};
use crate::capabilities::Capabilities;
use crate::operand::Element;

/// Elements in 16 bytes: what TMA counts starts of rows by.
const STEP: usize = 8;

/// Why a product can't be computed here.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum MatmulError {
    /// The device is no Hopper, or its compiler takes no inline PTX.
    #[error("no wgmma and TMA: the device is not of sm_90, or feature `cuda-cpp` is off")]
    NoHopper,
    /// Tensor cores don't take the element type with all its digits.
    #[error("products are of f16 and bf16, got {0:?}")]
    Element(Element),
    /// Operands of several element types.
    #[error("{operand} is of {got:?}, x of {expected:?}")]
    Elements {
        /// Which operand.
        operand: &'static str,
        /// Its element type.
        got: Element,
        /// The element type of X.
        expected: Element,
    },
    /// X and W don't fit each other.
    #[error("x has {x} columns, w has {w} rows")]
    Inner {
        /// Columns of X.
        x: usize,
        /// Rows of W.
        w: usize,
    },
    /// A residual or an output of another shape than the product.
    #[error("{operand} must be {expected:?}, got {got:?}")]
    Shape {
        /// Which operand.
        operand: &'static str,
        /// Its shape.
        got: [usize; 2],
        /// The shape of the output.
        expected: [usize; 2],
    },
    /// Nothing to compute, or more than coordinates of 31 bits reach.
    #[error("{extent} must be at least 1 and below 2147483648, got {got}")]
    Range {
        /// M, N or K.
        extent: &'static str,
        /// Its size.
        got: usize,
    },
    /// An extent that TMA can't step over.
    #[error("{extent} must be a multiple of {multiple}, got {got}")]
    Multiple {
        /// N or K.
        extent: &'static str,
        /// What it must be a multiple of.
        multiple: usize,
        /// Its size.
        got: usize,
    },
    /// A matrix of another memory order.
    #[error("{operand} must be {order}, got strides {got:?}")]
    Order {
        /// Which operand.
        operand: &'static str,
        /// What it may be.
        order: &'static str,
        /// Its strides, in elements.
        got: [usize; 2],
    },
    /// Lines of memory that TMA can't step over.
    #[error(
        "lines of {operand} must be at least {least} elements apart, a multiple of 8 below 2^39: \
         got {got}"
    )]
    Stride {
        /// Which operand.
        operand: &'static str,
        /// Length of a line.
        least: usize,
        /// Elements from one line to the next.
        got: usize,
    },
    /// A matrix that doesn't start at 16 bytes.
    #[error("{operand} must start at a multiple of 16 bytes, got offset {got}")]
    Offset {
        /// Which operand.
        operand: &'static str,
        /// Bytes before it in its buffer.
        got: u64,
    },
    /// Shared memory is short.
    #[error("needs {needs} bytes of shared memory, the device has {has}")]
    SharedMemory {
        /// Bytes needed.
        needs: usize,
        /// Bytes there are.
        has: usize,
    },
}

/// Whether a product can be computed on a device: f16 or bf16, N and K in multiples of 8 (N of 16 for
/// SwiGLU), starts of lines in multiples of 16 bytes.
///
/// # Errors
/// What stands in the way.
pub fn check(capabilities: &Capabilities, problem: &MatmulProblem) -> Result<(), MatmulError> {
    let MatmulProblem { x, w, epilogue } = problem;
    let ([m, k], [inner, n]) = (x.shape, w.shape);
    check_extents(capabilities, x.element, [m, k, n], matches!(epilogue, Epilogue::SwiGlu))?;
    if k != inner {
        return Err(MatmulError::Inner { x: k, w: inner });
    }
    check_rows("x", x, x.element)?;
    if w.layout().is_none() {
        let order = "row-major or column-major";
        return Err(MatmulError::Order { operand: "w", order, got: w.strides });
    }
    check_lines("w", w, x.element)?;
    if let Epilogue::Residual(residual) = epilogue {
        check_shape("the residual", residual, problem)?;
        check_rows("the residual", residual, x.element)?;
    }
    Ok(())
}

/// [`check()`] of what is known before there are tensors: element type, `[M, K, N]` (N the columns of W),
/// and whether SwiGLU follows.
///
/// # Errors
/// What stands in the way.
pub fn check_extents(
    capabilities: &Capabilities,
    element: Element,
    [m, k, n]: [usize; 3],
    swiglu: bool,
) -> Result<(), MatmulError> {
    launch::check(capabilities)?;
    if element == Element::F32 {
        return Err(MatmulError::Element(element));
    }
    for (extent, got) in [("M", m), ("N", n), ("K", k)] {
        if got == 0 || got > i32::MAX as usize {
            return Err(MatmulError::Range { extent, got });
        }
    }
    let columns = if swiglu { 2 * INTERLEAVE } else { STEP };
    for (extent, multiple, got) in [("K", STEP, k), ("N", columns, n)] {
        if got % multiple != 0 {
            return Err(MatmulError::Multiple { extent, multiple, got });
        }
    }
    Ok(())
}

/// Whether a matrix can be the output.
pub(super) fn check_out(problem: &MatmulProblem, out: &Matrix) -> Result<(), MatmulError> {
    check_shape("the output", out, problem)?;
    check_rows("the output", out, problem.x.element)
}

fn check_shape(
    operand: &'static str,
    matrix: &Matrix,
    problem: &MatmulProblem,
) -> Result<(), MatmulError> {
    let (got, expected) = (matrix.shape, problem.out_shape());
    if got == expected { Ok(()) } else { Err(MatmulError::Shape { operand, got, expected }) }
}

/// Whether TMA takes a matrix row by row.
fn check_rows(operand: &'static str, matrix: &Matrix, element: Element) -> Result<(), MatmulError> {
    if matrix.layout() != Some(Layout::RowMajor) {
        return Err(MatmulError::Order { operand, order: "row-major", got: matrix.strides });
    }
    check_lines(operand, matrix, element)
}

/// Whether TMA takes a matrix line by line.
pub(super) fn check_lines(
    operand: &'static str,
    matrix: &Matrix,
    expected: Element,
) -> Result<(), MatmulError> {
    if matrix.element != expected {
        return Err(MatmulError::Elements { operand, got: matrix.element, expected });
    }
    let (lines, length, stride) = matrix.lines();
    // The stride of a single line is never stepped over.
    if lines > 1 && (stride < length || stride % STEP != 0 || stride >= 1 << 39) {
        return Err(MatmulError::Stride { operand, least: length, got: stride });
    }
    match matrix.handle.offset_start {
        Some(got) if got % 16 != 0 => Err(MatmulError::Offset { operand, got }),
        _ => Ok(()),
    }
}
