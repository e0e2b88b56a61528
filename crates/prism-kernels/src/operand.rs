//! A tensor that a kernel reads: a buffer, its shape and strides.

use cubecl::ir::{AddressType, ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use derive_new::new;

/// Element types of Q, K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl Element {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The type in CubeCL's terms.
    pub fn elem_type(self) -> ElemType {
        match self {
            Self::F32 => ElemType::Float(FloatKind::F32),
            Self::F16 => ElemType::Float(FloatKind::F16),
            Self::BF16 => ElemType::Float(FloatKind::BF16),
        }
    }
}

/// A tensor `[batch, heads, length, head_dim]` on a device, with any strides (in elements).
#[derive(Debug, Clone, new)]
pub struct Operand {
    /// Its memory.
    pub handle: Handle,
    /// `[batch, heads, length, head_dim]`.
    pub shape: [usize; 4],
    /// Elements from one index to the next, of each dim.
    pub strides: [usize; 4],
    /// Type of its elements.
    pub element: Element,
}

impl Operand {
    /// A contiguous tensor.
    pub fn contiguous(handle: Handle, shape: [usize; 4], element: Element) -> Self {
        let [_, heads, len, dim] = shape;
        Self::new(handle, shape, [heads * len * dim, len * dim, dim, 1], element)
    }

    /// The widest vector of at most `bytes` that divides rows of `dim` elements and every stride,
    /// so that each row can be read in whole vectors. 1 if the last dim has gaps.
    pub fn vector_size(&self, bytes: usize) -> usize {
        let [.., dim] = self.shape;
        let mut size = (bytes / self.element.size()).max(1);
        let fits = |size: usize| {
            let aligned = |&(stride, extent): &(usize, usize)| extent == 1 || stride % size == 0;
            let steps = self.strides.into_iter().zip(self.shape).take(3).collect::<Vec<_>>();
            self.strides[3] == 1 && dim % size == 0 && steps.iter().all(aligned)
        };
        while size > 1 && !fits(size) {
            size /= 2;
        }
        size
    }

    /// Integers wide enough for every element offset.
    pub fn address_type(&self) -> AddressType {
        let last: usize = self.strides.iter().zip(self.shape).map(|(s, n)| s * n.max(1)).sum();
        AddressType::from_len(last)
    }

    /// The tensor as a kernel argument.
    pub fn arg(&self) -> TensorArg {
        // SAFETY: the kernels stay within `shape`, whose elements the owner of the handle vouches
        // to be in the buffer at `strides`.
        unsafe {
            TensorArg::from_raw_parts(self.handle.clone(), self.strides.into(), self.shape.into())
        }
    }
}

/// A flat buffer of `len` elements as a kernel argument.
pub(crate) fn buffer(handle: &Handle, len: usize) -> BufferArg {
    // SAFETY: every caller allocated `len` elements for it.
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}
