//! Strided views of the tensors, and the element types that they hold.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::matmul::Rows;

/// An element that the kernels read and write; all arithmetic is in f32.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// The value in f32, exactly.
    fn to_f32(self) -> f32;

    /// Converts `from` into `into`, exactly; the shorter of the two ends it.
    fn widen(from: &[Self], into: &mut [f32]);

    /// Rounds `from` into `into`, to nearest even; the shorter of the two ends it.
    fn narrow(from: &[f32], into: &mut [Self]);

    /// The same values as f32, where no conversion is needed.
    fn as_f32(_values: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Element for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn widen(from: &[Self], into: &mut [f32]) {
        Self::narrow(from, into);
    }

    fn narrow(from: &[f32], into: &mut [Self]) {
        let len = from.len().min(into.len());
        into[..len].copy_from_slice(&from[..len]);
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Element for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    fn widen(from: &[Self], into: &mut [f32]) {
        let len = from.len().min(into.len());
        from[..len].convert_to_f32_slice(&mut into[..len]);
    }

    fn narrow(from: &[f32], into: &mut [Self]) {
        let len = from.len().min(into.len());
        into[..len].convert_from_f32_slice(&from[..len]);
    }
}

impl Element for bf16 {
    fn to_f32(self) -> f32 {
        // A bf16 is the upper half of an f32: branch-free, so that `widen` vectorises.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn widen(from: &[Self], into: &mut [f32]) {
        for (from, into) in from.iter().zip(into) {
            *into = from.to_f32();
        }
    }

    fn narrow(from: &[f32], into: &mut [Self]) {
        let len = from.len().min(into.len());
        into[..len].convert_from_f32_slice(&from[..len]);
    }
}

/// Strided read-only view of a `[batch, heads, length, dim]` tensor.
///
/// Strides count elements and may be 0 (broadcast) or negative (flipped) in every dimension.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    shape: [usize; 4],
    strides: [isize; 4],
    offset: usize,
}

impl<'a, T: Element> View<'a, T> {
    /// View of `data` whose first element is `data[offset]`; `None` if any element of `shape` lies
    /// outside `data`.
    pub fn new(
        data: &'a [T],
        shape: [usize; 4],
        strides: [isize; 4],
        offset: usize,
    ) -> Option<Self> {
        if !shape.contains(&0) {
            let mut lowest = i128::try_from(offset).ok()?;
            let mut highest = lowest;
            for (len, stride) in shape.into_iter().zip(strides) {
                let reach = i128::try_from(len - 1).ok()? * i128::try_from(stride).ok()?;
                let end = if reach < 0 { &mut lowest } else { &mut highest };
                *end = end.checked_add(reach)?;
            }
            if lowest < 0 || highest >= i128::try_from(data.len()).ok()? {
                return None;
            }
        }
        Some(Self { data, shape, strides, offset })
    }

    /// View of a contiguous tensor; `None` if `data` is shorter than `shape`.
    pub fn contiguous(data: &'a [T], shape: [usize; 4]) -> Option<Self> {
        let mut strides = [1isize; 4];
        for axis in (0..3).rev() {
            let len = isize::try_from(shape[axis + 1]).ok()?;
            strides[axis] = strides[axis + 1].checked_mul(len)?;
        }
        Self::new(data, shape, strides, 0)
    }

    /// `[batch, heads, length, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// One head of one sequence; `batch` and `head` must lie inside the shape.
    pub(super) fn head(&self, batch: usize, head: usize) -> Head<'a, T> {
        let at = |index: usize, axis: usize| index as isize * self.strides[axis];
        Head {
            data: self.data,
            start: self.offset as isize + at(batch, 0) + at(head, 1),
            dim: self.shape[3],
            row_stride: self.strides[2],
            stride: self.strides[3],
        }
    }
}

/// Strided view of one head, `[length, dim]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head<'a, T> {
    data: &'a [T],
    start: isize,
    dim: usize,
    row_stride: isize,
    stride: isize,
}

impl<'a, T: Element> Head<'a, T> {
    /// Elements of a row.
    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// Widens row `i` into the first `dim` elements of `into`.
    #[inline(always)]
    pub(super) fn read(&self, i: usize, into: &mut [f32]) {
        let into = &mut into[..self.dim];
        let start = self.start + i as isize * self.row_stride;
        if self.stride == 1 {
            T::widen(&self.data[start as usize..][..self.dim], into);
        } else {
            for (c, into) in into.iter_mut().enumerate() {
                *into = self.data[(start + c as isize * self.stride) as usize].to_f32();
            }
        }
    }

    /// Rows `rows` in f32: those of the tensor itself where the elements of a row are neighbours
    /// and rows follow each other, else a contiguous copy in `scratch`.
    #[inline(always)]
    pub(super) fn rows<'s>(&self, rows: Range<usize>, scratch: &'s mut [f32]) -> Rows<'s>
    where
        'a: 's,
    {
        let dim = self.dim;
        if self.stride == 1 && self.row_stride >= dim as isize && !rows.is_empty() {
            let stride = self.row_stride as usize;
            let start = (self.start + rows.start as isize * self.row_stride) as usize;
            let len = (rows.len() - 1) * stride + dim;
            if let Some(values) = T::as_f32(&self.data[start..][..len]) {
                return Rows { values, stride };
            }
        }
        let into = &mut scratch[..rows.len() * dim];
        for (i, row) in rows.zip(into.chunks_exact_mut(dim)) {
            self.read(i, row);
        }
        Rows { values: into, stride: dim }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_must_lie_inside_its_data() {
        let data = [0f32; 24];
        assert!(View::contiguous(&data, [1, 2, 3, 4]).is_some());
        assert!(View::contiguous(&data, [1, 2, 3, 5]).is_none());
        assert!(View::new(&data, [1, 2, 3, 4], [0, 12, -4, 1], 8).is_some());
        assert!(View::new(&data, [1, 2, 3, 4], [0, 12, -4, 1], 7).is_none());
        assert!(View::new(&data, [9, 9, 9, 9], [0; 4], 23).is_some());
        assert!(View::new(&data, [9, 9, 9, 9], [0; 4], 24).is_none());
        assert!(View::new(&data, [0, 9, 9, 9], [99; 4], 99).is_some());
        assert!(View::new(&data, [usize::MAX; 4], [isize::MAX; 4], 0).is_none());
    }

    #[test]
    fn rows_follow_the_strides() {
        let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut scratch = [0.0; 24];
        let flipped = View::new(&data, [1, 2, 3, 4], [0, 12, -4, 1], 8).unwrap().head(0, 1);
        assert_eq!(
            flipped.rows(1..3, &mut scratch).values,
            [16., 17., 18., 19., 12., 13., 14., 15.]
        );
        let transposed = View::new(&data, [1, 2, 4, 3], [0, 12, 1, 4], 0).unwrap().head(0, 0);
        assert_eq!(transposed.rows(1..3, &mut scratch).values, [1., 5., 9., 2., 6., 10.]);
        let spread = View::new(&data, [1, 2, 3, 4], [0, 4, 8, 1], 0).unwrap().head(0, 1);
        let rows = spread.rows(1..3, &mut []);
        assert_eq!((rows.values.len(), rows.values[0], rows.stride), (12, 12., 8));
        let plain = View::contiguous(&data, [1, 2, 3, 4]).unwrap().head(0, 1);
        assert_eq!(plain.rows(2..3, &mut []).values, [20., 21., 22., 23.]);
    }
}
