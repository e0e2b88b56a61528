//! Decoding the "K" blocks of 256 weights.
//!
//! `Q4_K` and `Q5_K` split a block into 8 sub-blocks of 32 weights. Each has a 6-bit scale and a
//! 6-bit minimum, all 16 of them packed into 12 bytes; two 16-bit floats scale the scales and the
//! minimums. `Q6_K` has 16 sub-blocks of 16 weights with 8-bit scales.

use super::dequant::half;

/// The 6-bit scale and minimum of sub-block `index` (0 to 7).
///
/// Bytes 0 to 3 hold the scales of sub-blocks 0 to 3 in their low 6 bits, bytes 4 to 7 the
/// minimums. Of sub-blocks 4 to 7, bytes 8 to 11 hold the low 4 bits (scale in the low nibble,
/// minimum in the high one), and the top 2 bits of bytes 0 to 7 the rest.
fn scale_and_minimum(packed: &[u8], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let low = packed[index + 4];
        (low & 0xf | packed[index - 4] >> 6 << 4, low >> 4 | packed[index] >> 6 << 4)
    };
    (scale.into(), minimum.into())
}

/// Decodes a block whose bytes of nibbles are `packed`; `fifth(pair, i, high)` is the fifth bit,
/// already in place, of weight `i` in the low or high sub-block of a pair.
fn sub_blocks(
    block: &[u8],
    packed: &[u8],
    values: &mut [f32],
    fifth: impl Fn(usize, usize, usize) -> u8,
) {
    let (scale, minimum) = (half(block, 0), half(block, 2));
    let scales = &block[4..16];
    // 32 bytes carry two sub-blocks: one in the low nibbles, the next in the high ones.
    for (pair, (bytes, values)) in
        packed.chunks_exact(32).zip(values.chunks_exact_mut(64)).enumerate()
    {
        for high in 0..2 {
            let (sub_scale, sub_minimum) = scale_and_minimum(scales, 2 * pair + high);
            let (sub_scale, sub_minimum) = (scale * sub_scale, minimum * sub_minimum);
            for (i, &byte) in bytes.iter().enumerate() {
                let q = (byte >> (4 * high) & 0xf) + fifth(pair, i, high);
                values[32 * high + i] = sub_scale * f32::from(q) - sub_minimum;
            }
        }
    }
}

/// Two floats, 12 bytes of scales and minimums, 128 bytes of nibbles.
pub(super) fn q4_k(block: &[u8], values: &mut [f32]) {
    sub_blocks(block, &block[16..144], values, |_, _, _| 0);
}

/// As `Q4_K`, with 32 bytes of fifth bits before the nibbles: bit `s` of byte `i` belongs to
/// weight `i` of sub-block `s`.
pub(super) fn q5_k(block: &[u8], values: &mut [f32]) {
    let fifths = &block[16..48];
    sub_blocks(block, &block[48..176], values, |pair, i, high| {
        (fifths[i] >> (2 * pair + high) & 1) << 4
    });
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, one float.
///
/// Each half of the block takes 64 bytes of nibbles and 32 bytes of pairs for four runs of 32
/// weights: runs 0 and 1 are the low nibbles of the first and second 32 bytes, runs 2 and 3 the
/// high ones; the pairs of run `r` are bits `2r` and `2r + 1`.
pub(super) fn q6_k(block: &[u8], values: &mut [f32]) {
    let (nibbles, pairs, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = half(block, 208);
    for (n, values) in values.chunks_exact_mut(128).enumerate() {
        for (run, values) in values.chunks_exact_mut(32).enumerate() {
            for (i, value) in values.iter_mut().enumerate() {
                let low = nibbles[64 * n + 32 * (run % 2) + i] >> (4 * (run / 2)) & 0xf;
                let high = pairs[32 * n + i] >> (2 * run) & 3;
                let sub_scale = scales[8 * n + 2 * run + i / 16] as i8;
                let q = (low | high << 4) as i8 - 32;
                *value = scale * f32::from(sub_scale) * f32::from(q);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Distinct 6-bit values that need all their bits.
    const SCALES: [u8; 8] = [63, 1, 34, 17, 48, 15, 33, 62];
    const MINIMUMS: [u8; 8] = [2, 61, 16, 47, 32, 31, 14, 51];

    fn packed_scales() -> [u8; 12] {
        let mut packed = [0; 12];
        for i in 0..4 {
            packed[i] = SCALES[i] | (SCALES[i + 4] >> 4) << 6;
            packed[i + 4] = MINIMUMS[i] | (MINIMUMS[i + 4] >> 4) << 6;
            packed[i + 8] = (SCALES[i + 4] & 15) | (MINIMUMS[i + 4] & 15) << 4;
        }
        packed
    }

    fn header() -> Vec<u8> {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend(f16::from_f32(2.0).to_le_bytes());
        block.extend(packed_scales());
        block
    }

    #[test]
    fn do_all_eight_scales_and_minimums_unpack() {
        let packed = packed_scales();
        for i in 0..8 {
            assert_eq!(scale_and_minimum(&packed, i), (SCALES[i].into(), MINIMUMS[i].into()));
        }
    }

    #[test]
    fn does_q4_k_pair_sub_blocks_in_nibbles() {
        let mut block = header();
        block.extend((0..128u32).map(|i| (i * 7 % 256) as u8));
        let mut values = [0.0; 256];
        q4_k(&block, &mut values);
        for (i, value) in values.into_iter().enumerate() {
            let (sub, lane) = (i / 32, i % 32);
            let byte = ((sub / 2 * 32 + lane) * 7 % 256) as u8;
            let q = if sub % 2 == 0 { byte & 15 } else { byte >> 4 };
            let expected =
                0.5 * f32::from(SCALES[sub]) * f32::from(q) - 2.0 * f32::from(MINIMUMS[sub]);
            assert_eq!(value, expected, "weight {i}");
        }
    }

    #[test]
    fn does_q5_k_take_bit_s_for_sub_block_s() {
        let mut block = header();
        block.extend((0..32).map(|i| 1u8 << (i % 8)));
        block.extend([0x21; 128]);
        let mut values = [0.0; 256];
        q5_k(&block, &mut values);
        for (i, value) in values.into_iter().enumerate() {
            let (sub, lane) = (i / 32, i % 32);
            let fifth = if lane % 8 == sub { 16.0 } else { 0.0 };
            let q = if sub % 2 == 0 { 1.0 } else { 2.0 } + fifth;
            let expected = 0.5 * f32::from(SCALES[sub]) * q - 2.0 * f32::from(MINIMUMS[sub]);
            assert_eq!(value, expected, "weight {i}");
        }
    }

    #[test]
    fn does_q6_k_join_nibbles_pairs_and_signed_scales() {
        let mut weights = [0i8; 256];
        for (i, weight) in weights.iter_mut().enumerate() {
            *weight = (i * 37 % 64) as i8 - 32;
        }
        let scales = std::array::from_fn::<i8, 16, _>(|i| (i as i32 * 15 - 120) as i8);
        let mut block = vec![0u8; 192];
        for (i, &weight) in weights.iter().enumerate() {
            let q = (weight + 32) as u8;
            let (n, run, lane) = (i / 128, i % 128 / 32, i % 32);
            block[64 * n + 32 * (run % 2) + lane] |= (q & 15) << (4 * (run / 2));
            block[128 + 32 * n + lane] |= (q >> 4) << (2 * run);
        }
        block.extend(scales.map(|scale| scale as u8));
        block.extend(f16::from_f32(0.25).to_le_bytes());
        let mut values = [0.0; 256];
        q6_k(&block, &mut values);
        for (i, value) in values.into_iter().enumerate() {
            assert_eq!(value, 0.25 * f32::from(scales[i / 16]) * f32::from(weights[i]));
        }
    }
}
