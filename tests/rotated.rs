//! Does rotating and pooling at once change anything? Selections and outputs against those of Q and K
//! that were rotated on the host, and against the oracle; and a prompt that goes into a cache.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::plan::{Kernel, kernel};
use burn_prism::{
    AttentionOptions, AttentionShape, Calibration, PrismCache, PrismConfig, PrismError,
    PrismOutput, Rope, RopeLayout, RotaryTable, Scoring, SequenceLengths, Step, plan, plan_rotated,
    prism_attention, prism_attention_rotated, rotate_and_pool,
};
use rstest::rstest;
use tests::{
    Inputs, Kind, all_devices, assert_lse, assert_right, devices, devices_and_wgpu, grids, has,
    round, values,
};

const D: usize = 64;

fn config(layout: RopeLayout, rotary_dim: usize) -> PrismConfig {
    let rope = Rope { layout, rotary_dim: Some(rotary_dim), ..Rope::new(1e4) };
    let config = PrismConfig::new(rope).with_block(16).with_mass(0.8).with_dense_below(0);
    if rotary_dim == 0 { config } else { config.with_bands(32, 48) }
}

/// `[batch, heads, len, D]` turned by definition, row `i` of sequence `b` at position `at(b, i)`.
fn turned(
    x: &[f32],
    [heads, len]: [usize; 2],
    rope: &Rope,
    dtype: DType,
    at: impl Fn(usize, usize) -> Option<usize>,
) -> Vec<f32> {
    let (freqs, rotary) = (rope.inv_freq(D).unwrap(), rope.rotary_dim(D).unwrap());
    let rows = x.chunks_exact(D).enumerate().flat_map(|(line, row)| {
        let mut out: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        let Some(position) = at(line / len / heads, line % len) else { return vec![0.0; D] };
        for (j, freq) in freqs.iter().enumerate() {
            let (sin, cos) = (freq * position as f64).sin_cos();
            let [a, b] = rope.pair(j, rotary);
            (out[a], out[b]) = (out[a] * cos - out[b] * sin, out[a] * sin + out[b] * cos);
        }
        out.into_iter().map(|x| round(x as f32, dtype)).collect()
    });
    rows.collect()
}

struct Case {
    /// Before their rotary embedding.
    plain: Inputs,
    /// After.
    rotated: Inputs,
    lengths: Option<SequenceLengths>,
}

impl Case {
    fn new(
        shape: AttentionShape,
        lengths: Option<&[(usize, usize)]>,
        rope: &Rope,
        dtype: DType,
    ) -> Self {
        // A device rounds what it rotates elsewhere than the host does: before or after the scale, say. Heavy
        // tails would magnify that beyond any tolerance; attention itself is tested with them.
        let plain = Inputs::random(shape, Kind::Normal, dtype, 3);
        let each = |b: usize| lengths.map_or((shape.q_len, shape.kv_len), |lengths| lengths[b]);
        let query = |b: usize, i: usize| {
            let (q_len, kv_len) = each(b);
            (i < q_len).then(|| (i + kv_len).checked_sub(q_len)).flatten()
        };
        let key = |b: usize, j: usize| (j < each(b).1).then_some(j);
        let q = turned(&plain.q, [shape.q_heads, shape.q_len], rope, dtype, query);
        let k = turned(&plain.k, [shape.kv_heads, shape.kv_len], rope, dtype, key);
        let rotated = Inputs { q, k, ..plain.clone() };
        let lengths = lengths.map(|lengths| {
            let (q, kv) = lengths.iter().copied().unzip();
            SequenceLengths::new(q, kv)
        });
        Self { plain, rotated, lengths }
    }

    fn options(&self) -> AttentionOptions {
        let options = AttentionOptions::default().with_lse();
        match &self.lengths {
            Some(lengths) => options.with_lengths(lengths.clone()),
            None => options,
        }
    }

    fn at_once(&self, config: &PrismConfig, dtype: DType, device: &Device) -> PrismOutput {
        let [q, k, v] = self.plain.tensors(dtype, device);
        let table = RotaryTable::new(&config.rope, D, self.plain.shape.kv_len, device).unwrap();
        let rotated = rotate_and_pool(q, k, &table, config, &self.options()).unwrap();
        prism_attention_rotated(rotated, v).unwrap()
    }

    fn in_turn(&self, config: &PrismConfig, dtype: DType, device: &Device) -> PrismOutput {
        let [q, k, v] = self.rotated.tensors(dtype, device);
        prism_attention(q, k, v, config, &self.options()).unwrap()
    }
}

fn shape(batch: usize, q_len: usize, kv_len: usize) -> AttentionShape {
    let kv = [batch, 2, kv_len, D];
    AttentionShape::new([batch, 4, q_len, D], kv, kv).unwrap()
}

/// Selections differ by one block in a thousand at most.
fn assert_same_selection(what: &str, got: &PrismOutput, right: &PrismOutput) {
    assert_eq!((got.report.path, got.report.reason), (right.report.path, right.report.reason));
    let bools = |output: &PrismOutput| {
        let selected = output.report.selected.as_ref().map(|s| s.to_host().unwrap().to_bools());
        selected.unwrap_or_default()
    };
    let (a, b) = (bools(got), bools(right));
    let differing = a.iter().zip(&b).filter(|(a, b)| a != b).count();
    assert_eq!(a.len(), b.len(), "{what}");
    assert!(differing * 1000 <= a.len(), "{what}: {differing} of {} blocks differ", a.len());
}

fn check(devices: Vec<Device>, config: &PrismConfig, shape: AttentionShape, dtypes: &[DType]) {
    for device in devices {
        for &dtype in dtypes.iter().filter(|&&dtype| has(&device, dtype)) {
            let what = format!("{device:?} {dtype:?} {shape:?} {:?}", config.rope);
            let case = Case::new(shape, None, &config.rope, dtype);
            let got = case.at_once(config, dtype, &device);
            assert_same_selection(&what, &got, &case.in_turn(config, dtype, &device));
            let grids = grids(&shape, config.block);
            let selection = got.report.selected.map(|selected| selected.to_host().unwrap());
            let right = case.rotated.oracle(&grids, selection.as_ref());
            let naive = case.rotated.naive(&grids, selection.as_ref(), dtype);
            let out = values(got.output);
            assert_right(&what, &out, &right.out, &naive, D, shape.q_len, dtype);
            if dtype == DType::F32 {
                assert_lse(&what, &values(got.lse.unwrap()), &right.lse);
            }
        }
    }
}

#[rstest]
fn for_every_layout_and_rotary_dim(
    #[values(RopeLayout::RotateHalf, RopeLayout::Interleaved)] layout: RopeLayout,
    #[values(64, 32, 0)] rotary_dim: usize,
) {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    check(devices(), &config(layout, rotary_dim), shape(1, 150, 150), &dtypes);
}

#[rstest]
#[case::chunk(60, 200)]
#[case::more_queries_than_keys(80, 50)]
#[case::one_query(1, 70)]
fn for_chunks_and_for_more_queries_than_keys(#[case] q_len: usize, #[case] kv_len: usize) {
    check(
        devices_and_wgpu(),
        &config(RopeLayout::RotateHalf, 64),
        shape(2, q_len, kv_len),
        &[DType::F32],
    );
}

#[test]
fn on_every_device() {
    let config = config(RopeLayout::Interleaved, 32);
    check(all_devices(), &config, shape(1, 100, 100), &[DType::F32, DType::BF16]);
}

/// Blocks of 128: what Hopper's kernel takes, with the scale in Q.
#[test]
fn for_blocks_of_a_tile() {
    let kv = [1, 1, 700, D];
    let shape = AttentionShape::new([1, 2, 700, D], kv, kv).unwrap();
    let config = config(RopeLayout::RotateHalf, 64).with_block(128);
    check(devices(), &config, shape, &[DType::BF16]);
    check(devices(), &config.clone().with_dense_below(10_000), shape, &[DType::BF16]);
    let mut scaled = config;
    scaled.scale = Some(0.3);
    for device in devices().into_iter().filter(|device| has(device, DType::BF16)) {
        let case = Case::new(shape, None, &scaled.rope, DType::BF16);
        let got = values(case.at_once(&scaled, DType::BF16, &device).output);
        let right = values(case.in_turn(&scaled, DType::BF16, &device).output);
        let off = got.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let size = right.iter().fold(0.0, |size: f32, x| size.max(x.abs()));
        assert!(off <= 0.03 * size, "{device:?}: off by {off} of {size}");
    }
}

#[test]
fn for_ragged_batches_and_second_order_scores() {
    let lengths = [(150, 150), (40, 90), (30, 10)];
    let banded = config(RopeLayout::RotateHalf, 64);
    let mut second_order = banded.clone().with_scoring(Scoring::second_order()).with_block(32);
    second_order.bands = Default::default();
    for config in [banded, second_order] {
        for device in devices() {
            let case = Case::new(shape(3, 150, 150), Some(&lengths), &config.rope, DType::F32);
            let got = case.at_once(&config, DType::F32, &device);
            let right = case.in_turn(&config, DType::F32, &device);
            assert_same_selection(&format!("{device:?}"), &got, &right);
            let (got, right) = (values(got.output), values(right.output));
            let off = got.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-3, "{device:?}: off by {off}");
        }
    }
}

/// A prompt in chunks that the cache's module rotates, against the whole prompt rotated beforehand; with
/// causal calibration and chunks of whole blocks they select the same.
#[rstest]
#[case::whole(&[300])]
#[case::chunks(&[96, 160, 44])]
fn for_a_prompt_in_a_cache(#[case] chunks: &[usize], #[values(0, 10_000)] dense_below: usize) {
    let config = config(RopeLayout::RotateHalf, 64)
        .with_block(32)
        .with_calibration(Calibration::Causal)
        .with_dense_below(dense_below);
    let shape = shape(1, 300, 300);
    for device in devices_and_wgpu() {
        let case = Case::new(shape, None, &config.rope, DType::F32);
        let right = case.in_turn(&config, DType::F32, &device);
        let (attention, [q, k, v]) = (config.init(), case.plain.tensors(DType::F32, &device));
        let table = RotaryTable::new(&config.rope, D, 310, &device).unwrap();
        let mut cache = PrismCache::new(&shape, 310, 32, DType::F32, &device).unwrap();
        let (mut outputs, mut first) = (Vec::new(), 0);
        for &n in chunks {
            let [q, k, v] = [&q, &k, &v].map(|x| x.clone().narrow(2, first, n));
            let options = AttentionOptions::default().with_more_follows(first + n < 300);
            let got = attention.forward_with_rope(q, k, v, &table, &mut cache, &options).unwrap();
            assert_eq!(got.report.path, right.report.path);
            outputs.push(got.output);
            first += n;
        }
        assert_eq!(cache.len(), 300);
        let what = format!("{device:?} {chunks:?} {dense_below}");
        for (got, right) in [
            (Tensor::cat(outputs, 2), right.output),
            (cache.keys(), case.rotated.tensors(DType::F32, &device)[1].clone()),
        ] {
            let (got, right) = (values(got), values(right));
            assert_eq!(got.len(), right.len(), "{what}");
            let off = got.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-3, "{what}: off by {off}");
        }
        let more = |n| Tensor::<4>::zeros([1, 2, n, D], &device);
        let q = Tensor::zeros([1, 4, 11, D], &device);
        let call = |q, n, cache: &mut PrismCache| {
            let options = AttentionOptions::default();
            attention.forward_with_rope(q, more(n), more(n), &table, cache, &options).unwrap_err()
        };
        let says = call(q.clone(), 10, &mut cache).to_string();
        assert_eq!(says, "length of q is 11, but k has 10");
        let says = call(q, 11, &mut cache).to_string();
        assert_eq!(says, "RoPE: the table has 310 positions, the longest sequence 311");
        assert_eq!(cache.len(), 300);
    }
}

#[test]
fn gradients_flow_through_the_rotation() {
    let case =
        Case::new(shape(1, 40, 40), None, &config(RopeLayout::RotateHalf, 64).rope, DType::F32);
    let config = config(RopeLayout::RotateHalf, 64).with_dense_below(1000);
    let device = Device::flex().autodiff();
    let table = RotaryTable::new(&config.rope, D, 40, &device).unwrap();
    let [q, k, v] = case.plain.tensors(DType::F32, &device).map(Tensor::require_grad);
    let options = AttentionOptions::default();
    let rotated = rotate_and_pool(q.clone(), k.clone(), &table, &config, &options).unwrap();
    let out = prism_attention_rotated(rotated, v.clone()).unwrap().output;
    let grads = (out.clone() * out).sum().backward();

    let [turned_q, turned_k, turned_v] =
        case.rotated.tensors(DType::F32, &device).map(Tensor::require_grad);
    let out = prism_attention(turned_q.clone(), turned_k.clone(), turned_v, &config, &options);
    let out = out.unwrap().output;
    let right = (out.clone() * out).sum().backward();
    // A rotation keeps lengths: so it does those of gradients, row by row.
    for (got, right) in
        [(q.grad(&grads), turned_q.grad(&right)), (k.grad(&grads), turned_k.grad(&right))]
    {
        let (got, right) = (values(got.unwrap()), values(right.unwrap()));
        let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
        for (got, right) in got.chunks_exact(D).zip(right.chunks_exact(D)) {
            let (got, right) = (norm(got), norm(right));
            assert!((got - right).abs() <= 1e-3 * right.max(1.0), "{got}, not {right}");
        }
    }
    assert!(v.grad(&grads).is_some());
}

#[test]
fn the_plan_says_what_is_done_at_once() {
    for device in all_devices() {
        let config = config(RopeLayout::RotateHalf, 64);
        let steps = |rotated: bool, dense: bool| -> Vec<Step> {
            let config = config.clone().with_dense_below(if dense { 10_000 } else { 0 });
            let call = if rotated { plan_rotated } else { plan };
            call(&config, &shape(1, 200, 200), None, DType::F32, &device).unwrap().steps
        };
        assert_eq!(steps(false, false), [Step::Pool, Step::Select, Step::Attend]);
        assert_eq!(steps(false, true), [Step::Attend]);
        if matches!(kernel(&device), Kernel::Flex | Kernel::TensorOps) {
            let right = [Step::Rotate, Step::Pool, Step::Select, Step::Attend];
            assert_eq!(steps(true, false), right);
            assert_eq!(steps(true, true), [Step::Rotate, Step::Attend]);
        } else {
            assert_eq!(steps(true, false), [Step::RotateAndPool, Step::Select, Step::Attend]);
            assert_eq!(steps(true, true), [Step::RotateAndPool, Step::Attend]);
        }
    }
    assert_eq!(Step::RotateAndPool.to_string(), "rotate+pool");
}

#[test]
fn rotary_tables_that_do_not_fit_are_refused() {
    let device = Device::flex();
    let zeros = |dims: [usize; 4]| Tensor::<4>::zeros(dims, &device);
    let (q, kv) = (zeros([1, 2, 40, 64]), zeros([1, 1, 40, 64]));
    let (config, options) = (PrismConfig::llama3(), AttentionOptions::default());
    let table = |head_dim, positions, device: &Device| {
        RotaryTable::new(&config.rope, head_dim, positions, device).unwrap()
    };
    let refused = |table: &RotaryTable| {
        let rotated = rotate_and_pool(q.clone(), kv.clone(), table, &config, &options);
        rotated.unwrap_err()
    };
    let error = refused(&table(64, 39, &device)).to_string();
    assert_eq!(error, "RoPE: the table has 39 positions, the longest sequence 40");
    let error = refused(&table(128, 40, &device)).to_string();
    assert_eq!(error, "RoPE: the table turns 128 dims, the heads have 64");
    let error = refused(&table(64, 40, &tests::ndarray()));
    assert_eq!(error, PrismError::Device { left: "q", right: "the rotary table" });
    assert!(RotaryTable::new(&config.rope, 63, 40, &device).is_err());

    // And a V that doesn't go with K; no queries, or no keys, make empty results.
    let table = table(64, 40, &device);
    let rotate =
        |q: Tensor<4>, k: Tensor<4>| rotate_and_pool(q, k, &table, &config, &options).unwrap();
    let error = prism_attention_rotated(rotate(q.clone(), kv.clone()), zeros([1, 1, 39, 64]));
    assert!(error.unwrap_err().to_string().contains("length of k is 40, but v has 39"));
    for (q_len, keys) in [(0, 40), (40, 0), (0, 0)] {
        let (q, kv) = (zeros([1, 2, q_len, 64]), zeros([1, 1, keys, 64]));
        let got = prism_attention_rotated(rotate(q, kv.clone()), kv).unwrap();
        assert_eq!(got.output.dims(), [1, 2, q_len, 64]);
    }
}

/// Chunks behind the first, and single tokens, turn as the whole prompt does: on CubeCL's runtimes by the
/// kernel that the first takes, elsewhere by tensor ops.
#[rstest]
#[case(RopeLayout::RotateHalf, 64)]
#[case(RopeLayout::Interleaved, 32)]
fn later_chunks_turn_by_their_own_angles(#[case] layout: RopeLayout, #[case] rotary_dim: usize) {
    let config = config(layout, rotary_dim).with_dense_below(1000);
    let shape = shape(1, 40, 40);
    for device in all_devices() {
        let case = Case::new(shape, None, &config.rope, DType::F32);
        let right = case.in_turn(&config, DType::F32, &device);
        let (attention, [q, k, v]) = (config.init(), case.plain.tensors(DType::F32, &device));
        let table = RotaryTable::new(&config.rope, D, 64, &device).unwrap();
        let mut cache = PrismCache::new(&shape, 40, 16, DType::F32, &device).unwrap();
        let (mut outputs, mut first) = (Vec::new(), 0);
        for n in [9, 30, 1] {
            let [q, k, v] = [&q, &k, &v].map(|x| x.clone().narrow(2, first, n));
            let options = AttentionOptions::default();
            let got = attention.forward_with_rope(q, k, v, &table, &mut cache, &options).unwrap();
            outputs.push(got.output);
            first += n;
        }
        let keys = case.rotated.tensors(DType::F32, &device)[1].clone();
        for (got, right) in [(Tensor::cat(outputs, 2), right.output), (cache.keys(), keys)] {
            let (got, right) = (values(got), values(right));
            assert_eq!(got.len(), right.len());
            let off = got.iter().zip(&right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "{device:?}: off by {off}");
        }
    }
}

/// The angles are f64's, far out too.
#[test]
fn far_positions_turn_by_their_own_angle() {
    let rope = Rope::new(5e5);
    for device in devices_and_wgpu() {
        let table = RotaryTable::new(&rope, D, 131_072, &device).unwrap();
        for first in [0, 255, 256, 5000, 131_071] {
            // Ones in the first half: the cosines come out there, and the sines in the second.
            let x: Vec<f32> = (0..D).map(|c| if c < D / 2 { 1.0 } else { 0.0 }).collect();
            let x =
                Tensor::<1>::from_data(x.as_slice(), (&device, DType::F32)).reshape([1, 1, 1, D]);
            let got = values(table.rotate(x, first).unwrap());
            for (j, freq) in rope.inv_freq(D).unwrap().iter().enumerate() {
                let (sin, cos) = (freq * first as f64).sin_cos();
                for (got, right) in [(got[j], cos), (got[j + D / 2], sin)] {
                    let off = (f64::from(got) - right).abs();
                    assert!(off < 5e-7, "{device:?} position {first} pair {j}: {got}, not {right}");
                }
            }
        }
    }
}
