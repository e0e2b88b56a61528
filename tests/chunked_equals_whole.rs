//! Is a prompt in chunks the prompt? Dense always; Prism with causal calibration and chunks that
//! end on block boundaries, selection and all. And does a cache forget when told to?

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, Calibration, PrismAttention, PrismCache, PrismConfig,
    Scoring, prism_attention,
};
use rstest::rstest;
use tests::{Inputs, Kind, devices, devices_and_wgpu, values};

const BLOCK: usize = 32;
const LEN: usize = 300;

fn shape() -> AttentionShape {
    let kv = [1, 2, LEN, 64];
    AttentionShape::new([1, 6, LEN, 64], kv, kv).unwrap()
}

fn config(calibration: Calibration) -> PrismConfig {
    let config = PrismConfig::smollm2().with_block(BLOCK).with_mass(0.8).with_dense_below(0);
    config.with_bands(32, 48).with_calibration(calibration)
}

fn cache(device: &Device) -> PrismCache {
    PrismCache::new(&shape(), LEN + 10, BLOCK, DType::F32, device).unwrap()
}

/// Output and selected blocks of a prompt in chunks.
fn run(
    attention: &PrismAttention,
    [q, k, v]: [Tensor<4>; 3],
    cache: &mut PrismCache,
    chunks: &[usize],
) -> (Vec<f32>, Vec<bool>) {
    let (mut outputs, mut bits, mut start) = (Vec::new(), vec![Vec::new(); 6], 0);
    for (i, &n) in chunks.iter().enumerate() {
        let cut = |x: &Tensor<4>| x.clone().narrow(2, start, n);
        let options = AttentionOptions::default().with_more_follows(i + 1 < chunks.len());
        let result = attention.forward_cached(cut(&q), cut(&k), cut(&v), cache, &options).unwrap();
        outputs.push(result.output);
        if let Some(selected) = result.report.selected {
            let host = selected.to_host().unwrap();
            let [_, heads, rows, key_blocks] = host.shape();
            for (h, bits) in bits.iter_mut().enumerate().take(heads) {
                for row in 0..rows {
                    bits.extend(
                        (0..LEN.div_ceil(BLOCK))
                            .map(|v| v < key_blocks && host.contains(0, h, row, v)),
                    );
                }
            }
        }
        start += n;
    }
    (values(Tensor::cat(outputs, 2)), bits.concat())
}

fn close(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[rstest]
#[case(&[160, 140])]
#[case(&[32, 32, 32, 32, 32, 32, 32, 32, 44])]
#[case(&[288, 12])]
fn causal_prism_in_aligned_chunks_selects_the_same(#[case] chunks: &[usize]) {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 1);
    for device in if chunks == [160, 140] { devices_and_wgpu() } else { devices() } {
        let attention = config(Calibration::Causal).init();
        let whole =
            run(&attention, inputs.tensors(DType::F32, &device), &mut cache(&device), &[LEN]);
        let parts =
            run(&attention, inputs.tensors(DType::F32, &device), &mut cache(&device), chunks);
        assert_eq!(whole.1, parts.1, "{device:?}: selection");
        assert!(close(&whole.0, &parts.0) < 1e-5, "{device:?}: output");
    }
}

/// Second-order scores look at nothing but the blocks themselves, so they need no calibration for
/// it; means and variances of sub-blocks carry over in the cache.
#[rstest]
#[case(&[160, 140])]
#[case(&[32, 32, 32, 32, 32, 32, 32, 32, 44])]
#[case(&[288, 12])]
fn second_order_in_aligned_chunks_selects_the_same(#[case] chunks: &[usize]) {
    let inputs = Inputs::random(shape(), Kind::HeavyTailed, DType::F32, 8);
    let scoring = Scoring::SecondOrder { query_sub: 16, key_sub: 16 };
    let config = PrismConfig::smollm2().with_block(BLOCK).with_mass(0.8).with_dense_below(0);
    for device in devices() {
        let attention = config.clone().with_scoring(scoring).init();
        let whole =
            run(&attention, inputs.tensors(DType::F32, &device), &mut cache(&device), &[LEN]);
        let mut used = cache(&device);
        for _ in 0..2 {
            let parts = run(&attention, inputs.tensors(DType::F32, &device), &mut used, chunks);
            assert_eq!(whole.1, parts.1, "{device:?}: selection");
            assert!(close(&whole.0, &parts.0) < 1e-5, "{device:?}: output");
            used.reset();
        }
        // Without a cache it is the same selection, too.
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let report = attention.forward_with(q, k, v, &AttentionOptions::default()).unwrap().report;
        assert_eq!(report.selected.unwrap().to_host().unwrap().to_bools(), whole.1);
    }
}

#[rstest]
#[case(&[1, 299])]
#[case(&[100, 33, 1, 1, 165])]
fn dense_in_any_chunks_is_the_same(#[case] chunks: &[usize]) {
    let inputs = Inputs::random(shape(), Kind::HeavyTailed, DType::F32, 2);
    for device in devices() {
        let attention = config(Calibration::Global).with_mass(1.0).init();
        let whole =
            run(&attention, inputs.tensors(DType::F32, &device), &mut cache(&device), &[LEN]);
        let parts =
            run(&attention, inputs.tensors(DType::F32, &device), &mut cache(&device), chunks);
        assert!(close(&whole.0, &parts.0) < 1e-5, "{device:?}");
    }
}

/// A chunk that ends mid-block leaves a ragged pooled key block, which the next chunk must pool
/// anew: the pooled keys are then those of the whole.
#[test]
fn ragged_pooled_blocks_are_pooled_anew() {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 3);
    for device in devices_and_wgpu() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        // No query statistics and no calibration: only pooled keys carry over.
        let config = config(Calibration::Off);
        let whole = prism_attention(
            q.clone().narrow(2, LEN - 32, 32),
            k.clone(),
            v.clone(),
            &config,
            &AttentionOptions::default(),
        )
        .unwrap();
        let mut cache = cache(&device);
        let chunks = [50, 7, 100, 111, 32];
        let (output, _) = run(&config.init(), [q, k, v], &mut cache, &chunks);
        let heads = output.chunks(LEN * 64).map(|head| &head[(LEN - 32) * 64..]);
        let last: Vec<f32> = heads.flatten().copied().collect();
        assert!(close(&last, &values(whole.output)) < 1e-5, "{device:?}");
    }
}

#[test]
fn reset_leaves_nothing_behind() {
    let first = Inputs::random(shape(), Kind::Large, DType::F32, 4);
    let second = Inputs::random(shape(), Kind::Normal, DType::F32, 5);
    for device in devices_and_wgpu() {
        let attention = config(Calibration::Causal).init();
        let chunks = [96, 204];
        let mut used = cache(&device);
        run(&attention, first.tensors(DType::F32, &device), &mut used, &chunks);
        used.reset();
        assert!(used.is_empty());
        let again = run(&attention, second.tensors(DType::F32, &device), &mut used, &chunks);
        let fresh =
            run(&attention, second.tensors(DType::F32, &device), &mut cache(&device), &chunks);
        assert_eq!(again, fresh, "{device:?}");
    }
}

#[test]
fn truncated_caches_take_another_ending() {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 6);
    let other = Inputs::random(shape(), Kind::Normal, DType::F32, 7);
    for device in devices() {
        let attention = config(Calibration::Off).init();
        let mut cache = cache(&device);
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        run(&attention, [q.clone(), k.clone(), v.clone()], &mut cache, &[LEN]);
        cache.truncate(100).unwrap();
        assert!(cache.truncate(101).is_err());
        let [q2, k2, v2] = other.tensors(DType::F32, &device).map(|x| x.narrow(2, 0, 60));
        let options = AttentionOptions::default();
        let got = attention
            .forward_cached(q2.clone(), k2.clone(), v2.clone(), &mut cache, &options)
            .unwrap();
        let join = |a: Tensor<4>, b: Tensor<4>| Tensor::cat(vec![a.narrow(2, 0, 100), b], 2);
        let right = attention.forward_with(q2, join(k, k2), join(v, v2), &options).unwrap();
        assert!(close(&values(got.output), &values(right.output)) < 1e-5, "{device:?}");
    }
}
