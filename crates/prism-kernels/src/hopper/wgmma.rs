//! What products by `wgmma` have in common: descriptors of tiles in shared memory, in rows of 128
//! bytes under TMA's 128-byte swizzle, and the wait for products under way.
//!
//! A warpgroup's accumulators lie in PTX registers with names of their own, since CubeCL has no operand
//! that is both read and written. Of a 64-row product, a thread holds two rows, 8 apart: accumulator `i`
//! lies in row `16 · warp + lane / 4 + 8 · ((i / 2) % 2)` and column
//! `8 · (i / 4) + 2 · (lane % 4) + i % 2`.

use cubecl::prelude::*;

use crate::operand::Element;

/// 128-byte swizzle; 8 rows, 1024 bytes, from one group of rows to the next.
const SWIZZLED: u64 = 0x4000_0040_0000_0000;

/// Descriptor of a tile whose rows run along K: 16 steps of K are 32 bytes further.
#[cube]
pub(crate) fn k_major(address: u32) -> u64 {
    u64::cast_from((address & 0x3_ffffu32) >> 4u32) | comptime!(SWIZZLED | 1 << 16)
}

/// Descriptor of a tile whose rows run along M or N, in boxes of 64 columns, each `across` bytes
/// behind the one before: 16 steps of K are 2048 bytes further.
#[cube]
pub(crate) fn mn_major(address: u32, #[comptime] across: u32) -> u64 {
    u64::cast_from((address & 0x3_ffffu32) >> 4u32)
        | comptime!(SWIZZLED | (across as u64 / 16) << 16)
}

/// Waits until at most `pending` groups of products are under way.
#[cube]
pub(crate) fn wait_products(#[comptime] pending: u32) {
    gpu_asm!(
        "wgmma.wait_group.sync.aligned {n};", n = const pending,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// `{name}{first}, ..`, `count` registers.
pub(crate) fn list(name: &str, first: usize, count: usize) -> String {
    let names: Vec<_> = (first..first + count).map(|i| format!("{name}{i}")).collect();
    names.join(", ")
}

/// What PTX calls a 16-bit element type.
pub(crate) fn name(element: Element) -> &'static str {
    match element {
        Element::BF16 => "bf16",
        _ => "f16",
    }
}
