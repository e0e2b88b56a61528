//! Backend primitives under short names, so that formulas read like formulas.
//!
//! Floats are f32 and ints i32 unless cast. Binary ops broadcast.

use std::ops::{Add, BitAnd, BitOr, Div, Mul, Not, Range, Sub};

use burn::backend::tensor::{BoolTensor, Device, FloatTensor, IntTensor};
use burn::backend::{
    Backend, BoolDType, FloatDType, IntDType, Shape, Slice, TensorData, TensorMetadata,
    get_or_init_device_settings,
};
use prism_core::selection::WORD_BITS;

#[derive(Clone)]
pub struct Float<B: Backend>(pub FloatTensor<B>);

#[derive(Clone)]
pub struct Int<B: Backend>(pub IntTensor<B>);

#[derive(Clone)]
pub struct Bool<B: Backend>(pub BoolTensor<B>);

macro_rules! shape_ops {
    ($Kind:ident, $slice:ident, $reshape:ident) => {
        impl<B: Backend> $Kind<B> {
            pub fn dims<const D: usize>(&self) -> [usize; D] {
                self.0.shape().dims()
            }

            pub fn device(&self) -> Device<B> {
                self.0.device()
            }

            pub fn slice(self, dim: usize, range: Range<usize>) -> Self {
                let shape = self.0.shape();
                if range == (0..shape[dim]) {
                    return self;
                }
                let mut slices: Vec<Slice> = shape.iter().map(|&len| (0..len).into()).collect();
                slices[dim] = range.into();
                Self(B::$slice(self.0, &slices))
            }

            pub fn reshape<const D: usize>(self, dims: [usize; D]) -> Self {
                Self(B::$reshape(self.0, Shape::new(dims)))
            }
        }
    };
}

shape_ops!(Float, float_slice, float_reshape);
shape_ops!(Int, int_slice, int_reshape);
shape_ops!(Bool, bool_slice, bool_reshape);

macro_rules! expand_op {
    ($Kind:ident, $expand:ident) => {
        impl<B: Backend> $Kind<B> {
            pub fn expand(self, dims: impl Into<Shape>) -> Self {
                let shape = dims.into();
                if self.0.shape() == shape {
                    return self;
                }
                Self(B::$expand(self.0, shape))
            }
        }
    };
}

expand_op!(Float, float_expand);
expand_op!(Bool, bool_expand);

macro_rules! join_ops {
    ($Kind:ident, $Value:ty, $full:ident, $dtype:expr, $cat:ident) => {
        impl<B: Backend> $Kind<B> {
            pub fn full<const D: usize>(
                dims: [usize; D],
                value: $Value,
                device: &Device<B>,
            ) -> Self {
                Self(B::$full(Shape::new(dims), value.into(), device, $dtype))
            }

            /// Parts joined along `dim` and filled up to `dims` with `value`.
            pub fn join<const D: usize>(
                parts: Vec<Self>,
                dim: usize,
                dims: [usize; D],
                value: $Value,
                device: &Device<B>,
            ) -> Self {
                let got: usize = parts.iter().map(|part| part.dims::<D>()[dim]).sum();
                let mut parts: Vec<_> = parts.into_iter().map(|part| part.0).collect();
                if got < dims[dim] || parts.is_empty() {
                    let mut rest = dims;
                    rest[dim] -= got;
                    parts.push(Self::full(rest, value, device).0);
                }
                if parts.len() == 1 {
                    return Self(parts.swap_remove(0));
                }
                Self(B::$cat(parts, dim))
            }
        }
    };
}

join_ops!(Float, f32, float_full, FloatDType::F32, float_cat);
join_ops!(Int, i32, int_full, IntDType::I32, int_cat);

macro_rules! binary_ops {
    ($($Kind:ident $Trait:ident $name:ident $op:ident,)*) => {$(
        impl<B: Backend> $Trait for $Kind<B> {
            type Output = Self;

            fn $name(self, other: Self) -> Self {
                Self(B::$op(self.0, other.0))
            }
        }
    )*};
}

binary_ops!(
    Float Add add float_add,
    Float Sub sub float_sub,
    Float Mul mul float_mul,
    Float Div div float_div,
    Int Add add int_add,
    Int Sub sub int_sub,
    Int Mul mul int_mul,
    Int BitAnd bitand bitwise_and,
);

impl<B: Backend> Mul<f32> for Float<B> {
    type Output = Self;

    fn mul(self, factor: f32) -> Self {
        Self(B::float_mul_scalar(self.0, factor.into()))
    }
}

impl<B: Backend> Add<i32> for Int<B> {
    type Output = Self;

    fn add(self, term: i32) -> Self {
        Self(B::int_add_scalar(self.0, term.into()))
    }
}

impl<B: Backend> Mul<i32> for Int<B> {
    type Output = Self;

    fn mul(self, factor: i32) -> Self {
        Self(B::int_mul_scalar(self.0, factor.into()))
    }
}

impl<B: Backend> Div<i32> for Int<B> {
    type Output = Self;

    fn div(self, divisor: i32) -> Self {
        Self(B::int_div_scalar(self.0, divisor.into()))
    }
}

impl<B: Backend> Float<B> {
    pub fn from_list(values: Vec<f32>, device: &Device<B>) -> Self {
        let len = values.len();
        Self(B::float_from_data(TensorData::new(values, [len]), device))
    }

    pub fn cast(self, dtype: FloatDType) -> Self {
        if FloatDType::from(self.0.dtype()) == dtype {
            return self;
        }
        Self(B::float_cast(self.0, dtype))
    }

    pub fn detach(self) -> Self {
        Self(B::float_detach(self.0))
    }

    pub fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }

    pub fn transpose(self) -> Self {
        Self(B::float_transpose(self.0))
    }

    pub fn select(self, dim: usize, indices: Int<B>) -> Self {
        Self(B::float_select(self.0, dim, indices.0))
    }

    pub fn sum(self, dim: usize) -> Self {
        Self(B::float_sum_dim(self.0, dim))
    }

    pub fn mean(self, dim: usize) -> Self {
        Self(B::float_mean_dim(self.0, dim))
    }

    pub fn max(self, dim: usize) -> Self {
        Self(B::float_max_dim(self.0, dim))
    }

    pub fn cumsum(self, dim: usize) -> Self {
        Self(B::float_cumsum(self.0, dim))
    }

    pub fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }

    pub fn log(self) -> Self {
        Self(B::float_log(self.0))
    }

    pub fn sqrt(self) -> Self {
        Self(B::float_sqrt(self.0))
    }

    pub fn at_least(self, min: f32) -> Self {
        Self(B::float_clamp_min(self.0, min.into()))
    }

    pub fn at_most(self, max: f32) -> Self {
        Self(B::float_clamp_max(self.0, max.into()))
    }

    pub fn round(self) -> Int<B> {
        Int(B::float_into_int(B::float_round(self.0), IntDType::I32))
    }

    /// `value` where the mask is set.
    pub fn fill(self, mask: &Bool<B>, value: f32) -> Self {
        let mask = mask.clone().expand(self.0.shape());
        Self(B::float_mask_fill(self.0, mask.0, value.into()))
    }

    pub fn is_nan(&self) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::float_is_nan(self.0.clone(), dtype))
    }

    pub fn eq(&self, value: f32) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::float_equal_elem(self.0.clone(), value.into(), dtype))
    }

    pub fn gt(&self, value: f32) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::float_greater_elem(self.0.clone(), value.into(), dtype))
    }

    pub fn le(&self, value: f32) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        let tensor = self.0.clone();
        Bool(B::float_lower_equal_elem(tensor, value.into(), dtype))
    }
}

impl<B: Backend> Int<B> {
    pub fn from_list(values: Vec<i32>, device: &Device<B>) -> Self {
        let len = values.len();
        Self(B::int_from_data(TensorData::new(values, [len]), device))
    }

    /// The value of each bit of a word; that of bit 31 is negative.
    pub fn bits(device: &Device<B>) -> Self {
        Self::from_list((0..WORD_BITS).map(|bit| 1 << bit).collect(), device)
    }

    pub fn range(range: Range<usize>, device: &Device<B>) -> Self {
        let range = range.start as i64..range.end as i64;
        Self(B::int_arange(range, device, IntDType::I32))
    }

    pub fn select(self, dim: usize, indices: Int<B>) -> Self {
        Self(B::int_select(self.0, dim, indices.0))
    }

    pub fn sum(self, dim: usize) -> Self {
        Self(B::int_sum_dim(self.0, dim))
    }

    /// Sums of the elements so far along the last dim, of four. In stretches, which are summed likewise:
    /// CubeCL's devices read everything before an element for each.
    pub fn cumsum(self) -> Self {
        const STRETCH: usize = 64;
        let dims @ [a, b, c, len] = self.dims();
        if len <= STRETCH {
            return Self(B::int_cumsum(self.0, 3));
        }
        let (device, stretches) = (self.device(), len.div_ceil(STRETCH));
        let lines = a * b * c;
        let within = Self::join(vec![self], 3, [a, b, c, stretches * STRETCH], 0, &device)
            .reshape([1, lines, stretches, STRETCH]);
        let within = Self(B::int_cumsum(within.0, 3));
        let sums = within.clone().slice(3, STRETCH - 1..STRETCH);
        let sums = sums.reshape([1, 1, lines, stretches]);
        let before = (sums.clone().cumsum() - sums).reshape([1, lines, stretches, 1]);
        (within + before).reshape([a, b, c, stretches * STRETCH]).slice(3, 0..len).reshape(dims)
    }

    pub fn at_least(self, min: i32) -> Self {
        Self(B::int_clamp_min(self.0, min.into()))
    }

    pub fn at_most(self, max: i32) -> Self {
        Self(B::int_clamp_max(self.0, max.into()))
    }

    /// `value` where the mask is set.
    pub fn fill(self, mask: &Bool<B>, value: i32) -> Self {
        let mask = mask.clone().expand(self.0.shape());
        Self(B::int_mask_fill(self.0, mask.0, value.into()))
    }

    /// The larger of each pair, for tensors of one shape.
    pub fn max(self, other: Self) -> Self {
        let larger = other.gt(&self);
        Self(B::int_mask_where(self.0, larger.0, other.0))
    }

    pub fn is(&self, value: i32) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::int_equal_elem(self.0.clone(), value.into(), dtype))
    }

    pub fn below(&self, value: i32) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::int_lower_elem(self.0.clone(), value.into(), dtype))
    }

    pub fn eq(&self, other: &Self) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::int_equal(self.0.clone(), other.0.clone(), dtype))
    }

    pub fn gt(&self, other: &Self) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::int_greater(self.0.clone(), other.0.clone(), dtype))
    }

    pub fn ge(&self, other: &Self) -> Bool<B> {
        let dtype = bool_dtype::<B>(&self.device());
        Bool(B::int_greater_equal(self.0.clone(), other.0.clone(), dtype))
    }

    pub fn lt(&self, other: &Self) -> Bool<B> {
        other.gt(self)
    }
}

impl<B: Backend> Bool<B> {
    pub fn int(self) -> Int<B> {
        Int(B::bool_into_int(self.0, IntDType::I32))
    }

    pub fn float(self) -> Float<B> {
        Float(B::bool_into_float(self.0, FloatDType::F32))
    }

    /// Both at their common shape: not every backend broadcasts bools.
    fn align(self, other: Self) -> (Self, Self) {
        let (left, right) = (self.0.shape(), other.0.shape());
        let common: Vec<usize> = left.iter().zip(right.iter()).map(|(a, b)| *a.max(b)).collect();
        let common = Shape::from(common);
        (self.expand(common.clone()), other.expand(common))
    }
}

impl<B: Backend> BitAnd for Bool<B> {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        let (left, right) = self.align(other);
        Self(B::bool_and(left.0, right.0))
    }
}

impl<B: Backend> BitOr for Bool<B> {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        let (left, right) = self.align(other);
        Self(B::bool_or(left.0, right.0))
    }
}

impl<B: Backend> Not for Bool<B> {
    type Output = Self;

    fn not(self) -> Self {
        Self(B::bool_not(self.0))
    }
}

fn bool_dtype<B: Backend>(device: &Device<B>) -> BoolDType {
    get_or_init_device_settings::<B>(device).bool_dtype
}

#[cfg(test)]
mod tests {
    use burn::backend::Dispatch;
    use burn::tensor::{Device, Tensor, TensorData};

    #[test]
    fn sums_so_far_of_any_length() {
        for len in [1, 63, 64, 65, 128, 4095, 4097, 70_000] {
            let of = |line: usize, i: usize| ((i * 7919 + line * 31) % 13) as i32 - 4;
            let all: Vec<i32> = (0..4 * len).map(|at| of(at / len, at % len)).collect();
            let x = Tensor::<4, burn::tensor::Int>::from_data(
                TensorData::new(all, [2, 1, 2, len]),
                &Device::flex(),
            );
            let sums = super::Int::<Dispatch>(x.into_dispatch()).cumsum().0;
            let sums = Tensor::<4, burn::tensor::Int>::from_dispatch(sums).into_data();
            let got: Vec<i32> = sums.convert::<i32>().try_into_vec().unwrap();
            for line in 0..4 {
                let mut sum = 0;
                for i in 0..len {
                    sum += of(line, i);
                    assert_eq!(got[line * len + i], sum, "line {line}, {i} of {len}");
                }
            }
        }
    }
}
