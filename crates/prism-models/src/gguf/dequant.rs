//! Decoding tensors: plain floats and the blocks of 32 weights.
//!
//! A block of 32 holds its weights in 16 bytes of nibbles: byte `i` carries weight `i` in its low
//! half and weight `i + 16` in its high half. The five-bit types add the fifth bits as one 32-bit
//! word, bit `i` for weight `i`.

use half::{bf16, f16};
use rayon::prelude::*;

use super::dequant_k::{q4_k, q5_k, q6_k};
use super::ggml_type::GgmlType;

/// Weights that one task decodes: long enough to pay for starting it, a multiple of all blocks.
const TASK_WEIGHTS: usize = 1 << 16;

/// Decodes `bytes`, which hold exactly `values.len()` weights in whole blocks.
pub(super) fn dequantise(kind: GgmlType, bytes: &[u8], values: &mut [f32]) {
    let task_bytes = TASK_WEIGHTS / kind.block_weights() * kind.block_bytes();
    values
        .par_chunks_mut(TASK_WEIGHTS)
        .zip(bytes.par_chunks(task_bytes))
        .for_each(|(values, bytes)| blocks(kind, bytes, values));
}

fn blocks(kind: GgmlType, bytes: &[u8], values: &mut [f32]) {
    let decode = match kind {
        GgmlType::F32 => f32_le,
        GgmlType::F16 => |block: &[u8], values: &mut [f32]| values[0] = half(block, 0),
        GgmlType::BF16 => bf16_le,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q4_K => q4_k,
        GgmlType::Q5_K => q5_k,
        GgmlType::Q6_K => q6_k,
    };
    let blocks = bytes.chunks_exact(kind.block_bytes());
    for (block, values) in blocks.zip(values.chunks_exact_mut(kind.block_weights())) {
        decode(block, values);
    }
}

/// The 16-bit float at byte `at`.
pub(super) fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn f32_le(block: &[u8], values: &mut [f32]) {
    values[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
}

fn bf16_le(block: &[u8], values: &mut [f32]) {
    values[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
}

/// Decodes the nibbles of 32 weights, each with its fifth bit from `high`.
fn nibbles(packed: &[u8], high: u32, values: &mut [f32], decode: impl Fn(i32) -> f32) {
    for (i, &byte) in packed.iter().enumerate() {
        let fifth = |weight: usize| ((high >> weight & 1) << 4) as i32;
        values[i] = decode(i32::from(byte & 0xf) | fifth(i));
        values[i + 16] = decode(i32::from(byte >> 4) | fifth(i + 16));
    }
}

fn q4_0(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    nibbles(&block[2..], 0, values, |q| (q - 8) as f32 * scale);
}

fn q4_1(block: &[u8], values: &mut [f32]) {
    let (scale, minimum) = (half(block, 0), half(block, 2));
    nibbles(&block[4..], 0, values, |q| q as f32 * scale + minimum);
}

fn q5_0(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(&block[6..], high, values, |q| (q - 16) as f32 * scale);
}

fn q5_1(block: &[u8], values: &mut [f32]) {
    let (scale, minimum) = (half(block, 0), half(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], high, values, |q| q as f32 * scale + minimum);
}

fn q8_0(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    for (value, &byte) in values.iter_mut().zip(&block[2..]) {
        *value = f32::from(byte as i8) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(kind: GgmlType, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / kind.block_bytes() * kind.block_weights()];
        dequantise(kind, bytes, &mut values);
        values
    }

    /// Nibbles whose low halves count 0..16 and whose high halves count down 15..=0.
    fn counting() -> impl Iterator<Item = u8> {
        (0..16u8).map(|i| i | (15 - i) << 4)
    }

    #[test]
    fn do_the_float_types_decode() {
        assert_eq!(decode(GgmlType::F32, &(-1.25f32).to_le_bytes()), [-1.25]);
        assert_eq!(decode(GgmlType::F16, &[0x00, 0x3c, 0x00, 0xc0]), [1.0, -2.0]);
        assert_eq!(decode(GgmlType::BF16, &[0x80, 0x3f, 0x20, 0xc1]), [1.0, -10.0]);
    }

    #[test]
    fn does_q4_0_put_low_nibbles_first_around_eight() {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend(counting());
        let values = decode(GgmlType::Q4_0, &block);
        for i in 0..16 {
            assert_eq!(values[i], (i as f32 - 8.0) * 0.5);
            assert_eq!(values[i + 16], (7.0 - i as f32) * 0.5);
        }
    }

    #[test]
    fn does_q4_1_add_the_minimum() {
        let mut block = f16::from_f32(2.0).to_le_bytes().to_vec();
        block.extend(f16::from_f32(-3.0).to_le_bytes());
        block.extend(counting());
        let values = decode(GgmlType::Q4_1, &block);
        for i in 0..16 {
            assert_eq!(values[i], i as f32 * 2.0 - 3.0);
            assert_eq!(values[i + 16], (15.0 - i as f32) * 2.0 - 3.0);
        }
    }

    #[test]
    fn do_the_five_bit_types_take_bit_i_for_weight_i() {
        let high = 0x8001_0003u32;
        let fifth = |i: usize| {
            if [0, 1, 16, 31].contains(&i) { 16.0 } else { 0.0 }
        };
        let mut plain = f16::from_f32(1.0).to_le_bytes().to_vec();
        let mut shifted = plain.clone();
        shifted.extend(f16::from_f32(100.0).to_le_bytes());
        for block in [&mut plain, &mut shifted] {
            block.extend(high.to_le_bytes());
            block.extend(counting());
        }
        let (q5_0, q5_1) = (decode(GgmlType::Q5_0, &plain), decode(GgmlType::Q5_1, &shifted));
        for i in 0..32 {
            let nibble = if i < 16 { i as f32 } else { 31.0 - i as f32 };
            assert_eq!(q5_0[i], nibble + fifth(i) - 16.0);
            assert_eq!(q5_1[i], nibble + fifth(i) + 100.0);
        }
    }

    #[test]
    fn does_q8_0_read_signed_bytes() {
        let mut block = f16::from_f32(0.25).to_le_bytes().to_vec();
        block.extend((0..32).map(|i| (i * 8 - 128) as u8));
        let values = decode(GgmlType::Q8_0, &block);
        for (i, value) in values.into_iter().enumerate() {
            assert_eq!(value, (i as f32 * 8.0 - 128.0) * 0.25);
        }
    }

    #[test]
    fn do_several_tasks_agree_with_one() {
        let weights = TASK_WEIGHTS + 64;
        let bytes = (0..weights * 2).map(|i| (i % 251) as u8 & 0x3f).collect::<Vec<_>>();
        let mut whole = vec![0.0; weights];
        blocks(GgmlType::F16, &bytes, &mut whole);
        assert_eq!(decode(GgmlType::F16, &bytes), whole);
    }
}
