//! A matrix that a kernel reads or writes: a buffer, its shape and strides.

use cubecl::server::Handle;
use derive_new::new;

use crate::operand::Element;

/// A matrix `[rows, columns]` on a device, with any strides (in elements).
#[derive(Debug, Clone, new)]
pub struct Matrix {
    /// Its memory.
    pub handle: Handle,
    /// `[rows, columns]`.
    pub shape: [usize; 2],
    /// Elements from one row to the next, and from one column to the next.
    pub strides: [usize; 2],
    /// Type of its elements.
    pub element: Element,
}

/// Which neighbours of a matrix lie next to each other in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    /// Those of a row.
    RowMajor,
    /// Those of a column.
    ColumnMajor,
}

impl Matrix {
    /// A matrix without gaps, row after row.
    pub fn row_major(handle: Handle, shape: [usize; 2], element: Element) -> Self {
        Self::new(handle, shape, [shape[1], 1], element)
    }

    /// A matrix without gaps, column after column: the weight `[out, in]` of a linear layer, seen as
    /// `[in, out]`.
    pub fn column_major(handle: Handle, shape: [usize; 2], element: Element) -> Self {
        Self::new(handle, shape, [1, shape[0]], element)
    }

    /// Elements of the buffer, from the first to the last of the matrix.
    pub fn span(&self) -> usize {
        let steps = self.shape.iter().zip(self.strides).map(|(&n, stride)| {
            let last = n.checked_sub(1);
            last.map(|last| last * stride)
        });
        steps.sum::<Option<usize>>().map_or(0, |last| last + 1)
    }

    /// Which neighbours lie next to each other; `None` if none do.
    pub(super) fn layout(&self) -> Option<Layout> {
        match self.strides {
            [_, 1] => Some(Layout::RowMajor),
            [1, _] => Some(Layout::ColumnMajor),
            _ => None,
        }
    }

    /// How many lines without gaps there are, their length, and the elements from one to the next.
    pub(super) fn lines(&self) -> (usize, usize, usize) {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        match self.layout() {
            Some(Layout::ColumnMajor) => (columns, rows, column),
            _ => (rows, columns, row),
        }
    }
}
