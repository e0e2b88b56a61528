//! Products with a weight on CubeCL's runtimes: Hopper's kernel where it runs, else Burn's matmul.

use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use prism_kernels::Capabilities;
use prism_kernels::matmul::{Epilogue, MatmulProblem, Matrix, check_extents, matmul};

use super::cube::{element, output};
use crate::fallback;

/// What keeps Hopper's kernel from a product `[M, K, N]` (N the columns of the weight).
///
/// # Errors
/// The limit and what the device or the product has.
pub fn check(
    device: &CubeDevice,
    dtype: DType,
    shape: [usize; 3],
    swiglu: bool,
) -> Result<(), String> {
    let element = element(dtype).ok_or_else(|| format!("takes f16 and bf16, got {dtype:?}"))?;
    let capabilities = Capabilities::of(&device.client());
    check_extents(&capabilities, element, shape, swiglu).map_err(|error| error.to_string())
}

/// x·W, by what runs it.
pub fn linear(x: CubeTensor, weight: CubeTensor) -> CubeTensor {
    match hopper(&x, &weight, None, false) {
        Some(out) => out,
        None => fallback::linear::<CubeBackend>(x, weight),
    }
}

/// x·W + residual, by what runs it.
pub fn linear_residual(x: CubeTensor, weight: CubeTensor, residual: CubeTensor) -> CubeTensor {
    match hopper(&x, &weight, Some(&residual), false) {
        Some(out) => out,
        None => fallback::linear_residual::<CubeBackend>(x, weight, residual),
    }
}

/// silu(x·gate) · (x·up), by what runs it.
pub fn swiglu(x: CubeTensor, weight: CubeTensor) -> CubeTensor {
    match hopper(&x, &weight, None, true) {
        Some(out) => out,
        None => fallback::swiglu::<CubeBackend>(x, weight),
    }
}

/// The product on Hopper's tensor cores; `None` where they don't take it. The plan has looked at
/// device, type and shape: here only the memory order of a weight can still be in the way, and copying a
/// weight at every call would cost more than the kernel gains.
fn hopper(
    x: &CubeTensor,
    weight: &CubeTensor,
    residual: Option<&CubeTensor>,
    swiglu: bool,
) -> Option<CubeTensor> {
    let (a, w) = (rows(x)?, matrix(weight)?);
    let residual = match residual {
        Some(residual) => Some(rows(residual)?),
        None => None,
    };
    let epilogue = match &residual {
        Some(residual) => Epilogue::Residual(residual),
        None if swiglu => Epilogue::SwiGlu,
        None => Epilogue::Plain,
    };
    let problem = MatmulProblem::new(&a, &w, epilogue);
    let [_, columns] = problem.out_shape();
    let handle = matmul(&x.client, &Capabilities::of(&x.client), &problem).ok()?;
    let mut shape = x.meta.shape().to_vec();
    *shape.last_mut()? = columns;
    Some(output(x, handle, Shape::from(shape), x.dtype))
}

/// A weight `[K, N]` where it lies, in whatever order.
fn matrix(x: &CubeTensor) -> Option<Matrix> {
    let element = element(x.dtype).filter(|_| !x.meta.is_tiled())?;
    let ([rows, columns], [down, along]) = (x.meta.shape().dims(), &x.meta.strides()[..]) else {
        return None;
    };
    Some(Matrix::new(x.handle.clone(), [rows, columns], [*down, *along], element))
}

/// `[.., K]` as the matrix `[M, K]`: where it lies if its rows are evenly apart, else copied.
fn rows(x: &CubeTensor) -> Option<Matrix> {
    let (&columns, leading) = x.meta.shape().split_last()?;
    let shape = [leading.iter().product(), columns];
    let stride = row_stride(x.meta.shape(), x.meta.strides()).filter(|_| !x.meta.is_tiled());
    let (handle, stride) = match stride {
        Some(stride) => (x.handle.clone(), stride),
        None => (into_contiguous(x.clone()).handle, columns),
    };
    Some(Matrix::new(handle, shape, [stride, 1], element(x.dtype)?))
}

/// Elements from one row of `[.., K]` to the next, if that is the same for all of them, in multiples of
/// the 16 bytes that TMA steps by.
fn row_stride(shape: &[usize], strides: &[usize]) -> Option<usize> {
    let ((&columns, shape), (&along, strides)) = (shape.split_last()?, strides.split_last()?);
    let mut dims = shape.iter().zip(strides).rev().filter(|&(&extent, _)| extent != 1);
    let Some((&extent, &stride)) = dims.next() else { return (along == 1).then_some(columns) };
    let steps = along == 1 && stride >= columns && stride % 8 == 0;
    let mut next = extent * stride;
    let even = dims.all(|(&extent, &stride)| {
        let even = stride == next;
        next *= extent;
        even
    });
    (steps && even).then_some(stride)
}

#[cfg(test)]
mod tests {
    use super::row_stride;

    #[test]
    fn rows_are_read_where_they_lie_if_they_are_evenly_apart() {
        let contiguous = [([4, 6, 16], [96, 16, 1]), ([1, 6, 16], [7, 16, 1])];
        for (shape, strides) in contiguous {
            assert_eq!(row_stride(&shape, &strides), Some(16));
        }
        // Pitched rows, a single row, leading columns of wider rows.
        assert_eq!(row_stride(&[4, 6, 16], &[6 * 32, 32, 1]), Some(32));
        assert_eq!(row_stride(&[1, 1, 16], &[5, 3, 1]), Some(16));
        assert_eq!(row_stride(&[6, 16], &[24, 1]), Some(24));
        // Swapped dims, a gap between batches, broadcast rows, rows that TMA can't step over.
        for strides in [[16, 64, 1], [100, 16, 1], [96, 0, 1], [6 * 20, 20, 1], [96, 1, 6]] {
            assert_eq!(row_stride(&[4, 6, 16], &strides), None, "{strides:?}");
        }
    }
}
