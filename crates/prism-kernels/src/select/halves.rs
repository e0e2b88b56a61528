//! f32 rows as sums of two f16 halves, for tensor cores. A row is scaled by a power of two, so that
//! its largest number lies between 2¹⁴ and 2¹⁵: then the halves hold 22 bits of it, and of smaller
//! numbers all that counts beside it.

use cubecl::prelude::*;
use cubecl::server::Handle;
use half::f16;

use crate::operand::buffer;
use crate::work::{cube_count, launch};

/// Rows a cube of the kernel, one a warp.
const ROWS: usize = 4;

/// Rows as [`Halves`] and their [`Scale::inverse`]s.
pub(super) struct Split {
    /// `[heads, dim / 16, keys, 4]` vectors of four u32: what a warp reads at once lies together.
    pub halves: Handle,
    /// `[rows]` f32.
    pub inverses: Handle,
}

/// Splits rows `[heads, keys]` of `dim` numbers, a multiple of 16 up to 256.
pub(super) fn split(
    client: &Client,
    numbers: &Handle,
    [heads, keys]: [usize; 2],
    dim: usize,
) -> Split {
    let rows = heads * keys;
    let vectors = rows * dim / 4;
    let split = Split { halves: client.empty(vectors * 16), inverses: client.empty(rows * 4) };
    // SAFETY: warps past the last row do nothing.
    unsafe {
        launch!(
            split_kernel,
            client,
            cube_count(client, rows.div_ceil(ROWS)),
            CubeDim::new_2d(32, ROWS as u32),
            buffer(numbers, vectors),
            buffer(&split.halves, vectors),
            buffer(&split.inverses, rows),
            rows,
            keys,
            dim / 4,
        );
    }
    split
}

#[cube(launch_unchecked, create_dummy_kernel)]
fn split_kernel(
    numbers: &[Vector<f32, Const<4>>],
    halves: &mut [Vector<u32, Const<4>>],
    inverses: &mut [f32],
    rows: usize,
    keys: usize,
    #[comptime] chunks: usize,
) {
    let lane = UNIT_POS_X as usize;
    let row = CUBE_POS * comptime!(ROWS) + UNIT_POS_Y as usize;
    if row < rows {
        let mut largest = 0u32;
        let mut c = lane;
        while c < chunks {
            largest = largest.max(magnitude(numbers[row * chunks + c]));
            c += 32usize;
        }
        let scale = scale(plane_max(largest));
        let mut c = lane;
        while c < chunks {
            let group = row / keys * comptime!(chunks / 4) + c / 4;
            let place = (group * keys + row % keys) * 4 + c % 4;
            halves[place] = halved(numbers[row * chunks + c], scale.factor);
            c += 32usize;
        }
        if lane == 0 {
            inverses[row] = scale.inverse;
        }
    }
}

/// A power of two and its inverse.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Scale {
    pub factor: f32,
    pub inverse: f32,
}

/// The scale of a row whose largest [`magnitude`] this is.
#[cube]
pub(super) fn scale(largest: u32) -> Scale {
    // Exponents from 2^-100 on, so that both powers are normal numbers.
    let exponent = (largest >> 23u32).max(27u32);
    Scale {
        factor: f32::reinterpret((268u32 - exponent) << 23u32),
        inverse: f32::reinterpret((exponent - 14u32) << 23u32),
    }
}

/// Bits of the largest finite magnitude.
#[cube]
pub(super) fn magnitude(x: Vector<f32, Const<4>>) -> u32 {
    let mut largest = 0u32;
    #[unroll]
    for e in 0..4usize {
        let bits = u32::reinterpret(x.extract(e)) & 0x7fff_ffffu32;
        largest = largest.max(select(bits < 0x7f80_0000u32, bits, 0u32));
    }
    largest
}

/// The upper halves of `x · factor` in two words, then the lower halves.
#[cube]
pub(super) fn halved(x: Vector<f32, Const<4>>, factor: f32) -> Vector<u32, Const<4>> {
    let mut out = Vector::<u32, Const<4>>::new(0u32);
    #[unroll]
    for pair in 0..2usize {
        let mut high = Vector::<f16, Const<2>>::new(f16::from_int(0));
        let mut low = Vector::<f16, Const<2>>::new(f16::from_int(0));
        #[unroll]
        for e in 0..2usize {
            let scaled = x.extract(pair * 2 + e) * factor;
            let upper = f16::cast_from(scaled);
            high.insert(e, upper);
            low.insert(e, f16::cast_from(scaled - f32::cast_from(upper)));
        }
        out.insert(pair, u32::reinterpret(high));
        out.insert(pair + 2, u32::reinterpret(low));
    }
    out
}
