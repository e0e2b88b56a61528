//! Devices, inputs and references shared by the kernel tests.
#![allow(dead_code)] // Each test file uses its own part.

use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::bands::{BandRule, Bands};
use prism_core::{AttentionShape, BlockGrid, Rope};
use prism_kernels::{Capabilities, Element, Operand};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A device under test.
pub struct Bench {
    pub name: &'static str,
    pub client: Client,
    pub capabilities: Capabilities,
}

/// The devices that this build has.
pub fn devices() -> Vec<Bench> {
    vec![
        #[cfg(feature = "cpu")]
        bench("cpu", cubecl::Device::Cpu(Default::default())),
        #[cfg(feature = "wgpu")]
        bench("wgpu", cubecl::Device::Wgpu(Default::default())),
        #[cfg(feature = "cuda")]
        bench("cuda", cubecl::Device::Cuda(Default::default())),
    ]
}

fn bench(name: &'static str, device: cubecl::Device) -> Bench {
    let client = device.client();
    let mut capabilities = Capabilities::of(&client);
    let hardware = &client.properties().hardware;
    // Mesa's CPU driver doesn't report its subgroup operations, which work.
    if name == "wgpu" && hardware.plane_size_min == hardware.plane_size_max {
        capabilities.plane = Some(hardware.plane_size_min);
    }
    Bench { name, client, capabilities }
}

pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut normal =
        || -> f32 { (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.707 };
    (0..len).map(|_| normal()).collect()
}

pub fn upload(client: &Client, values: &[f32]) -> Handle {
    client.create_from_slice(f32::as_bytes(values))
}

pub fn operand(client: &Client, values: &[f32], shape: [usize; 4]) -> Operand {
    Operand::contiguous(upload(client, values), shape, Element::F32)
}

pub fn floats(client: &Client, handle: &Handle) -> Vec<f32> {
    f32::from_bytes(&client.read_one(handle.clone()).expect("the kernel ran")).to_vec()
}

pub fn integers(client: &Client, handle: &Handle) -> Vec<u32> {
    u32::from_bytes(&client.read_one(handle.clone()).expect("the kernel ran")).to_vec()
}

pub fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// Problems that between them hold every shape of grid: chunks, ragged batches, odd blocks, GQA.
pub struct Problem {
    pub name: &'static str,
    pub shape: AttentionShape,
    pub grids: Vec<BlockGrid>,
}

/// A problem of `[batch, q_heads, kv_heads, q_len, kv_len, head_dim]`.
pub fn problem(
    name: &'static str,
    [batch, q_heads, kv_heads, q_len, kv_len, dim]: [usize; 6],
    block: usize,
    lengths: Option<&[(usize, usize)]>,
) -> Problem {
    let q = [batch, q_heads, q_len, dim];
    let kv = [batch, kv_heads, kv_len, dim];
    let shape = AttentionShape::new(q, kv, kv).unwrap();
    let uniform = vec![(q_len, kv_len); batch];
    let grids = lengths.unwrap_or(&uniform).iter();
    let grids = grids.map(|&(q, kv)| BlockGrid::new(block, q, kv).unwrap()).collect();
    Problem { name, shape, grids }
}

pub fn problems() -> Vec<Problem> {
    vec![
        problem("one token", [1, 1, 1, 1, 1, 32], 16, None),
        problem("whole blocks", [1, 2, 1, 128, 128, 64], 32, None),
        problem("odd length, group 3", [1, 3, 1, 127, 127, 64], 16, None),
        problem("chunk that starts mid-block", [1, 4, 2, 70, 170, 32], 32, None),
        problem("more queries than keys", [1, 2, 2, 60, 40, 32], 16, None),
        problem("ragged", [3, 2, 1, 100, 130, 32], 32, Some(&[(100, 130), (1, 77), (33, 33)])),
        problem("head_dim 80", [1, 2, 1, 96, 96, 80], 32, None),
        problem("long row", [1, 1, 1, 16, 1200, 32], 16, None),
    ]
}

/// The bands of a Llama head of this width.
pub fn bands(dim: usize, block: usize) -> Bands {
    Bands::new(BandRule::Auto, Some(&Rope::new(10_000.0)), dim, block).unwrap()
}
