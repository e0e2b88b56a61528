//! What the tests share: fixtures, inputs, and when an output counts as right.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_prism::{AttentionShape, BlockGrid, BlockSelection};
use half::{bf16, f16};
use prism_core::oracle::{self, Attended};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::{Dtype, SafeTensors};

/// Devices under test in every case: Flex has native kernels, ndarray runs the tensor-op bodies.
/// `PRISM_TEST_DEVICES` chooses others, as in `flex,cuda`.
pub fn devices() -> Vec<Device> {
    chosen().unwrap_or_else(|| ["flex", "ndarray"].map(device).into())
}

/// [`devices`], and wgpu where this package's features build it, which mostly finds a software
/// renderer: for cases that stand for others.
pub fn devices_and_wgpu() -> Vec<Device> {
    extended(&[("wgpu", cfg!(feature = "wgpu"))])
}

/// [`devices_and_wgpu`] and CubeCL's CPU runtime: for cases of little work. It compiles every kernel
/// anew in every test, and the units of a cube are threads that spin until the last one arrives.
pub fn all_devices() -> Vec<Device> {
    extended(&[("wgpu", cfg!(feature = "wgpu")), ("cpu", cfg!(feature = "cpu"))])
}

fn extended(more: &[(&str, bool)]) -> Vec<Device> {
    let built = more.iter().filter(|(_, built)| *built && chosen().is_none());
    devices().into_iter().chain(built.map(|(name, _)| device(name))).collect()
}

fn chosen() -> Option<Vec<Device>> {
    let names = std::env::var("PRISM_TEST_DEVICES").ok()?;
    Some(names.split(',').map(device).collect())
}

/// Whether a device has an element type; says so where it hasn't.
pub fn has(device: &Device, dtype: DType) -> bool {
    let has = device.supports_dtype(dtype);
    if !has {
        eprintln!("{device:?} has no {dtype:?}: not tested");
    }
    has
}

/// Whether Burn's own f32 products are right to f32: on NVIDIA GPUs they round to TF32, by another kernel for
/// another number of rows. Kernels of ours don't.
pub fn has_exact_products(device: &Device) -> bool {
    !format!("{device:?}").contains("Cuda")
}

/// The device of a name; one that isn't built is a failure, never a pass.
fn device(name: &str) -> Device {
    match name {
        "flex" => Device::flex(),
        "ndarray" => ndarray(),
        #[cfg(feature = "cpu")]
        "cpu" => Device::cpu(),
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(0),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        other => panic!("the tests are built without a device {other:?}"),
    }
}

/// The device without kernels of ours.
#[allow(deprecated)] // Burn deprecates it, users still have it.
pub fn ndarray() -> Device {
    Device::ndarray()
}

/// The folder of golden data: `PRISM_FIXTURES`, else `../shared/fixtures` beside the repository,
/// else the repository's own copy.
pub fn fixtures() -> PathBuf {
    if let Some(path) = std::env::var_os("PRISM_FIXTURES") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let shared = root.join("../shared/fixtures");
    if shared.is_dir() { shared } else { root.join("fixtures") }
}

/// Files of a folder of the fixtures with the given ending; none is a failure, never a pass.
pub fn fixture_files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let folder = fixtures().join(folder);
    let entries = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("no fixtures at {}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no *{ending} at {}", folder.display());
    files
}

/// A safetensors file, decoded.
pub struct Fixture {
    /// Metadata of the header.
    pub metadata: HashMap<String, String>,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Fixture {
    /// Reads a file.
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = SafeTensors::deserialize(&bytes)
            .unwrap()
            .iter()
            .map(|(name, view)| {
                let data = view.data();
                let values = match view.dtype() {
                    Dtype::F32 => data
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                        .collect(),
                    Dtype::I32 => data
                        .chunks_exact(4)
                        .map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f32)
                        .collect(),
                    Dtype::BF16 => data
                        .chunks_exact(2)
                        .map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                        .collect(),
                    Dtype::U8 => data.iter().map(|&b| f32::from(b)).collect(),
                    other => panic!("{name}: {other:?}"),
                };
                (name.to_string(), (view.shape().to_vec(), values))
            })
            .collect();
        Self { metadata: header.metadata().clone().unwrap_or_default(), tensors }
    }

    /// A number of the metadata.
    pub fn number(&self, name: &str) -> f64 {
        self.metadata[name].parse().unwrap()
    }

    /// Values of a tensor.
    pub fn values(&self, name: &str) -> &[f32] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// Whether it holds a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor of rank 4.
    pub fn shape(&self, name: &str) -> [usize; 4] {
        self.tensors[name].0.as_slice().try_into().unwrap()
    }

    /// A tensor on a device.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Tensor<4> {
        tensor(self.values(name), self.shape(name), dtype, device)
    }
}

/// A tensor from f32 values.
pub fn tensor(values: &[f32], shape: [usize; 4], dtype: DType, device: &Device) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, dtype))
}

/// The values of a tensor in f32.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data_dtype(DType::F32).try_into_vec::<f32>().unwrap()
}

/// Kinds of input that break different things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Standard normal.
    Normal,
    /// Normal cubed: a few large values.
    HeavyTailed,
    /// Zeros with rare large values.
    Spikes,
    /// All the same.
    Constant,
    /// Normal times 30; times 8 in f16, beyond which the naive scores overflow; times 100 in
    /// bf16.
    Large,
}

/// Random inputs of a kind, already rounded to `dtype`.
pub fn random(kind: Kind, len: usize, dtype: DType, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut normal = move || {
        let (a, b): (f64, f64) = (rng.random(), rng.random());
        ((-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    };
    (0..len)
        .map(|_| {
            let x = normal();
            round(
                match kind {
                    Kind::Normal => x,
                    Kind::HeavyTailed => x * x * x,
                    Kind::Spikes => {
                        if x.abs() > 2.5 {
                            8.0 * x
                        } else {
                            0.0
                        }
                    }
                    Kind::Constant => 0.75,
                    Kind::Large if dtype == DType::F16 => 8.0 * x,
                    Kind::Large if dtype == DType::BF16 => 100.0 * x,
                    Kind::Large => 30.0 * x,
                },
                dtype,
            )
        })
        .collect()
}

/// Rounds to an element type.
pub fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        other => panic!("{other:?}"),
    }
}

/// Relative rounding of an element type.
fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => f64::from(f16::EPSILON.to_f32()),
        DType::BF16 => f64::from(bf16::EPSILON.to_f32()),
        other => panic!("{other:?}"),
    }
}

/// Q, K and V on the host.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Shape of the call.
    pub shape: AttentionShape,
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: Vec<f32>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub k: Vec<f32>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub v: Vec<f32>,
}

impl Inputs {
    /// Random inputs of a kind.
    pub fn random(shape: AttentionShape, kind: Kind, dtype: DType, seed: u64) -> Self {
        let q = shape.batch * shape.q_heads * shape.q_len * shape.head_dim;
        let kv = shape.batch * shape.kv_heads * shape.kv_len * shape.head_dim;
        Self {
            shape,
            q: random(kind, q, dtype, seed),
            k: random(kind, kv, dtype, seed + 1),
            v: random(
                if kind == Kind::Constant { Kind::Normal } else { kind },
                kv,
                dtype,
                seed + 2,
            ),
        }
    }

    /// As tensors.
    pub fn tensors(&self, dtype: DType, device: &Device) -> [Tensor<4>; 3] {
        let s = &self.shape;
        let q = [s.batch, s.q_heads, s.q_len, s.head_dim];
        let kv = [s.batch, s.kv_heads, s.kv_len, s.head_dim];
        [
            tensor(&self.q, q, dtype, device),
            tensor(&self.k, kv, dtype, device),
            tensor(&self.v, kv, dtype, device),
        ]
    }

    /// The oracle's answer.
    pub fn oracle(&self, grids: &[BlockGrid], selection: Option<&BlockSelection>) -> Attended {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let scale = 1.0 / (self.shape.head_dim as f64).sqrt();
        let (q, k, v) = (wide(&self.q), wide(&self.k), wide(&self.v));
        oracle::attend(&q, &k, &v, &self.shape, grids, selection, scale)
    }

    /// The answer of a plain implementation that rounds scores, probabilities and output to
    /// `dtype`: how far off an honest one may be.
    pub fn naive(
        &self,
        grids: &[BlockGrid],
        selection: Option<&BlockSelection>,
        dtype: DType,
    ) -> Vec<f32> {
        let AttentionShape { batch, q_heads, kv_heads, q_len, kv_len, head_dim: d } = self.shape;
        let scale = 1.0 / (d as f32).sqrt();
        let mut out = vec![0.0; batch * q_heads * q_len * d];
        for (b, grid) in grids.iter().enumerate().take(batch) {
            for h in 0..q_heads {
                let kv = (b * kv_heads + h / self.shape.group()) * kv_len;
                for row in 0..grid.rows() {
                    for i in grid.queries(row) {
                        let at = (b * q_heads + h) * q_len + i;
                        let q = &self.q[at * d..][..d];
                        let keys: Vec<usize> = (0..grid.visible_keys(i))
                            .filter(|j| {
                                selection.is_none_or(|s| s.contains(b, h, row, j / grid.block()))
                            })
                            .collect();
                        let scores: Vec<f32> = keys
                            .iter()
                            .map(|j| {
                                let k = &self.k[(kv + j) * d..][..d];
                                let dot: f32 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                                round(round(dot, dtype) * scale, dtype)
                            })
                            .collect();
                        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        let total: f32 = scores.iter().map(|s| (s - max).exp()).sum();
                        for (c, o) in out[at * d..][..d].iter_mut().enumerate() {
                            let sum: f32 = keys
                                .iter()
                                .zip(&scores)
                                .map(|(j, s)| {
                                    let p = round((s - max).exp() / total, dtype);
                                    p * self.v[(kv + j) * d + c]
                                })
                                .sum();
                            *o = round(sum, dtype);
                        }
                    }
                }
            }
        }
        out
    }
}

/// Asserts the error rule: max|out − oracle| ≤ 2 max|naive − oracle| + 2 rounding(dtype), and the
/// cosine of every run of 128 rows of every head is at least 0.9999.
pub fn assert_right(
    what: &str,
    out: &[f32],
    oracle: &[f64],
    naive: &[f32],
    d: usize,
    len: usize,
    dtype: DType,
) {
    assert!(oracle.iter().all(|x| x.is_finite()), "{what}: the oracle is not finite");
    assert_eq!(out.len(), oracle.len(), "{what}: length");
    let error = |got: &[f32]| {
        got.iter().zip(oracle).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, |max, e| {
            assert!(!e.is_nan(), "{what}: NaN in the output");
            f64::max(max, e)
        })
    };
    let size = oracle.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    let allowed = 2.0 * error(naive) + 2.0 * epsilon(dtype) * size;
    let got = error(out);
    assert!(got <= allowed, "{what}: off by {got:e}, allowed {allowed:e}");
    assert_cosine(what, out, oracle, d, len);
}

/// Asserts that every run of 128 rows of every head points where the oracle's does.
pub fn assert_cosine(what: &str, out: &[f32], oracle: &[f64], d: usize, len: usize) {
    for (head, (out, oracle)) in out.chunks(len * d).zip(oracle.chunks(len * d)).enumerate() {
        for (run, (a, b)) in out.chunks(128 * d).zip(oracle.chunks(128 * d)).enumerate() {
            let dot: f64 = a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum();
            let norm_a: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let norm_b: f64 = b.iter().map(|x| x.powi(2)).sum::<f64>().sqrt();
            if norm_b > 0.0 {
                let cosine = dot / (norm_a * norm_b);
                assert!(
                    cosine >= 0.9999,
                    "{what}: head {head}, rows {}: cosine {cosine}",
                    run * 128
                );
            } else {
                assert_eq!(norm_a, 0.0, "{what}: head {head} should be 0");
            }
        }
    }
}

/// Asserts that LSEs agree: −∞ where the oracle says so, else within 1e-5 of the right value
/// (relative, or absolute below 1) and 1e-6 of the largest one, which is what cancelling scores
/// leave in f32.
pub fn assert_lse(what: &str, lse: &[f32], oracle: &[f64]) {
    assert_eq!(lse.len(), oracle.len(), "{what}: length of the LSE");
    let finite = oracle.iter().filter(|x| x.is_finite());
    let largest = finite.fold(0.0, |max: f64, x| max.max(x.abs()));
    for (i, (&got, &right)) in lse.iter().zip(oracle).enumerate() {
        if right == f64::NEG_INFINITY {
            assert_eq!(got, f32::NEG_INFINITY, "{what}: LSE of row {i}");
        } else {
            let allowed = 1e-5 * right.abs().max(1.0) + 1e-6 * largest;
            let off = (f64::from(got) - right).abs();
            assert!(off <= allowed, "{what}: LSE of row {i}: {got}, not {right}");
        }
    }
}

/// One grid a sequence, all of the same lengths.
pub fn grids(shape: &AttentionShape, block: usize) -> Vec<BlockGrid> {
    vec![BlockGrid::new(block, shape.q_len, shape.kv_len).unwrap(); shape.batch]
}

/// A random selection that keeps each causal block with the given probability, block 0 and the
/// diagonal always.
pub fn random_selection(grids: &[BlockGrid], heads: usize, keep: f64, seed: u64) -> BlockSelection {
    let mut rng = StdRng::seed_from_u64(seed);
    let (rows, key_blocks) = prism_core::selection::extent(grids);
    let mut selection = BlockSelection::empty(grids.len(), heads, rows, key_blocks);
    for (b, grid) in grids.iter().enumerate() {
        for h in 0..heads {
            for row in 0..grid.rows() {
                let causal = grid.causal_blocks(row);
                let blocks: Vec<usize> = (0..causal)
                    .filter(|&v| v == 0 || v + 1 == causal || rng.random::<f64>() < keep)
                    .collect();
                selection.set_row(b, h, row, blocks);
            }
        }
    }
    selection
}
