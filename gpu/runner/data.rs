//! Inputs made on the device from a hash of the index, so that the host can tell any element of a
//! tensor of any size without holding it.

use cubecl::prelude::*;
use half::{bf16, f16};
use prism_kernels::{Element, Operand};

use crate::Gpu;

/// About normal, of standard deviation 1.15.
pub fn value(seed: u32, index: usize, element: Element) -> f64 {
    let mut h = (index as u32).wrapping_mul(0x9e37_79b9) ^ ((index >> 32) as u32) ^ seed;
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^= h >> 16;
    let sum = (h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24);
    let x = (sum as f32 - 510.0) / 128.0;
    match element {
        Element::F32 => x.into(),
        Element::F16 => f16::from_f32(x).to_f64(),
        Element::BF16 => bf16::from_f32(x).to_f64(),
    }
}

/// A contiguous tensor of such values.
pub fn tensor(gpu: &Gpu, seed: u32, shape: [usize; 4], element: Element) -> Operand {
    let len = shape.iter().product::<usize>();
    let handle = gpu.client.empty(len * element.size());
    let cubes = len.div_ceil(256).min(1 << 16);
    // SAFETY: indices stay below `len`.
    unsafe {
        fill::launch_unchecked(
            &gpu.client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(256),
            cubecl::ir::AddressType::U64,
            BufferArg::from_raw_parts(handle.clone(), len),
            len,
            seed,
            element.elem_type(),
        );
    }
    Operand::contiguous(handle, shape, element)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn fill<E: Float>(out: &mut [E], len: usize, seed: u32, #[define(E)] _element: ElemType) {
    let mut i = ABSOLUTE_POS;
    let step = CUBE_COUNT * CUBE_DIM as usize;
    while i < len {
        let high = u64::cast_from(i) >> 32u64;
        let low = u32::cast_from(i);
        let h = (low * 0x9e37_79b9u32) ^ u32::cast_from(high) ^ seed;
        let h = (h ^ (h >> 16u32)) * 0x85eb_ca6bu32;
        let h = (h ^ (h >> 13u32)) * 0xc2b2_ae35u32;
        let h = h ^ (h >> 16u32);
        let sum = (h & 255u32) + ((h >> 8u32) & 255u32) + ((h >> 16u32) & 255u32) + (h >> 24u32);
        out[i] = E::cast_from((f32::cast_from(sum) - 510.0f32) / 128.0f32);
        i += step;
    }
}

/// Values of a device buffer.
pub fn read(gpu: &Gpu, handle: &cubecl::server::Handle, element: Element) -> Vec<f32> {
    let bytes = gpu.client.read_one(handle.clone()).expect("the kernels ran");
    match element {
        Element::F32 => bytemuck::cast_slice(&bytes).to_vec(),
        Element::F16 => bytemuck::cast_slice::<_, f16>(&bytes).iter().map(|x| x.to_f32()).collect(),
        Element::BF16 => {
            bytemuck::cast_slice::<_, bf16>(&bytes).iter().map(|x| x.to_f32()).collect()
        }
    }
}

/// A buffer full of NaN, to tell what a kernel leaves unwritten.
pub fn poisoned(gpu: &Gpu, len: usize, element: Element) -> cubecl::server::Handle {
    gpu.client.create_from_slice(&vec![0xff; (len * element.size()).max(4)])
}
