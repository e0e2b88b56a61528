//! NaN, infinities, zeros and extremes: they may reach the rows that read them, nothing else, and
//! selection stays in range and ends.

use burn::tensor::{DType, Device};
use burn_prism::{
    AttentionOptions, AttentionShape, BandRule, PrismConfig, Scoring, SelectedBlocks,
    block_sparse_attention, dense_attention, prism_attention, select_blocks,
};
use rstest::rstest;
use tests::{Inputs, Kind, all_devices, devices, grids, has, random_selection, values};

const LEN: usize = 160;
const BLOCK: usize = 32;
const D: usize = 64;

fn shape() -> AttentionShape {
    let kv = [1, 2, LEN, D];
    AttentionShape::new([1, 4, LEN, D], kv, kv).unwrap()
}

fn config() -> PrismConfig {
    PrismConfig::smollm2().with_block(BLOCK).with_bands(32, 48).with_mass(0.7).with_dense_below(0)
}

fn inputs() -> Inputs {
    Inputs::random(shape(), Kind::Normal, DType::F32, 1)
}

/// Rows of a flat `[heads, LEN, D]` output that aren't finite, as (head, row).
fn bad_rows(out: &[f32]) -> Vec<(usize, usize)> {
    let rows = out.chunks(D).enumerate();
    rows.filter(|(_, row)| row.iter().any(|x| !x.is_finite()))
        .map(|(line, _)| (line / LEN, line % LEN))
        .collect()
}

/// 24, 25: one bad key or value reaches the rows that read it and no other.
#[rstest]
fn a_bad_key_or_value_stays_with_its_readers(
    #[values("k", "v")] which: &str,
    #[values(f32::NAN, f32::INFINITY, f32::NEG_INFINITY)] bad: f32,
    #[values(DType::F32, DType::BF16)] dtype: DType,
) {
    let grids = grids(&shape(), BLOCK);
    let selection = random_selection(&grids, 4, 0.4, 2);
    let mut inputs = inputs();
    let (kv_head, key) = (1, 70);
    let data = if which == "k" { &mut inputs.k } else { &mut inputs.v };
    data[(kv_head * LEN + key) * D..][..D].fill(bad);
    for device in if bad.is_nan() { all_devices() } else { devices() } {
        if !has(&device, dtype) {
            continue;
        }
        let [q, k, v] = inputs.tensors(dtype, &device);
        let selected =
            SelectedBlocks::from_host(&selection, &shape(), BLOCK, None, &device).unwrap();
        let options = AttentionOptions::default();
        let got = block_sparse_attention(q, k, v, &selected, &options).unwrap();
        for (head, row) in bad_rows(&values(got.output)) {
            let reads = head / 2 == kv_head
                && row >= key
                && selection.contains(0, head, row / BLOCK, key / BLOCK);
            assert!(reads, "{device:?}: {bad} in {which} leaked to head {head}, row {row}");
        }
    }
}

/// 24: a NaN key or value that is read is not swept under the rug.
#[rstest]
fn a_nan_that_is_read_shows(
    #[values("k", "v")] which: &str,
    #[values(DType::F32, DType::BF16)] dtype: DType,
) {
    let mut inputs = inputs();
    let data = if which == "k" { &mut inputs.k } else { &mut inputs.v };
    data[70 * D] = f32::NAN;
    for device in all_devices() {
        if !has(&device, dtype) {
            continue;
        }
        let [q, k, v] = inputs.tensors(dtype, &device);
        let got = dense_attention(q, k, v, &AttentionOptions::default()).unwrap();
        let expected: Vec<_> = (0..2).flat_map(|h| (70..LEN).map(move |i| (h, i))).collect();
        assert_eq!(bad_rows(&values(got.output)), expected, "{device:?}");
    }
}

/// 25: a bad query stays in its own row.
#[test]
fn a_bad_query_stays_in_its_row() {
    let mut inputs = inputs();
    inputs.q[(LEN + 50) * D + 3] = f32::NAN;
    for device in all_devices() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let got = dense_attention(q, k, v, &AttentionOptions::default()).unwrap();
        assert_eq!(bad_rows(&values(got.output)), [(1, 50)], "{device:?}");
    }
}

/// 24, 26, 28, 29: whatever the numbers, selections stay valid.
#[rstest]
fn selection_stays_in_range(
    #[values(f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, 1e-40, 0.0)] bad: f32,
    #[values("q", "k", "both")] which: &str,
    #[values(1, LEN * D / 2, usize::MAX)] how_many: usize,
) {
    let mut inputs = inputs();
    let soil = |x: &mut Vec<f32>| x.iter_mut().take(how_many).for_each(|x| *x = bad);
    if which != "k" {
        soil(&mut inputs.q);
    }
    if which != "q" {
        soil(&mut inputs.k);
    }
    let worst = which == "both" && how_many == LEN * D / 2 && (bad.is_nan() || bad > 1e30);
    for device in if worst { all_devices() } else { devices() } {
        let [q, k, _] = inputs.tensors(DType::F32, &device);
        let got = select_blocks(q, k, &config(), &AttentionOptions::default()).unwrap();
        got.to_host().unwrap().validate(&grids(&shape(), BLOCK), 4).unwrap();
        let [q, k, _] = inputs.tensors(DType::F32, &device);
        let second_order = PrismConfig { bands: BandRule::Auto, ..config() };
        let second_order =
            second_order.with_scoring(Scoring::SecondOrder { query_sub: 16, key_sub: 32 });
        let got = select_blocks(q, k, &second_order, &AttentionOptions::default()).unwrap();
        got.to_host().unwrap().validate(&grids(&shape(), BLOCK), 4).unwrap();
    }
}

/// 24: a NaN in one head's keys changes no other head's selection.
#[test]
fn a_nan_changes_no_other_heads_selection() {
    let clean = inputs();
    let mut dirty = clean.clone();
    dirty.k[10] = f32::NAN;
    for device in all_devices() {
        let select = |inputs: &Inputs| {
            let [q, k, _] = inputs.tensors(DType::F32, &device);
            let got = select_blocks(q, k, &config(), &AttentionOptions::default()).unwrap();
            got.to_host().unwrap()
        };
        let (clean, dirty) = (select(&clean), select(&dirty));
        for head in 2..4 {
            for row in 0..5 {
                assert_eq!(clean.row_words(0, head, row), dirty.row_words(0, head, row));
            }
        }
    }
}

/// 27: all-zero Q and K: uniform probabilities, outputs are running means of V.
#[test]
fn zeros_give_running_means() {
    let mut inputs = inputs();
    inputs.q.fill(0.0);
    inputs.k.fill(0.0);
    for device in all_devices() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let config = config().with_mass(1.0);
        let got = prism_attention(q, k, v, &config, &AttentionOptions::default()).unwrap();
        let out = values(got.output);
        let mean: f32 = (0..=100).map(|j| inputs.v[j * D]).sum::<f32>() / 101.0;
        assert!((out[100 * D] - mean).abs() < 1e-6, "{device:?}");
    }
}

/// 29: pooling 128 half-precision values that overflow f16 as a sum.
#[test]
fn pooling_does_not_overflow_half_precision() {
    let device = Device::flex();
    let mut inputs = inputs();
    inputs.q.fill(30_000.0);
    inputs.k.fill(-30_000.0);
    let [q, k, v] = inputs.tensors(DType::F16, &device);
    let got = prism_attention(q, k, v, &config(), &AttentionOptions::default()).unwrap();
    got.report.selected.as_ref().unwrap().to_host().unwrap();
    assert!(values(got.output).iter().all(|x| x.is_finite()));
}

/// 30: exact ties go to the lower index: with equal scores and mass .5 the first half is kept.
#[test]
fn ties_go_to_the_lower_index() {
    let mut inputs = inputs();
    inputs.q.fill(1.0);
    inputs.k.fill(1.0);
    let mut config = config().with_mass(0.5).with_dense_last_blocks(0);
    config.selection.sink_blocks = 0;
    config.selection.recent_blocks = 0;
    for device in all_devices() {
        let [q, k, _] = inputs.tensors(DType::F32, &device);
        let got = select_blocks(q, k, &config, &AttentionOptions::default()).unwrap();
        let host = got.to_host().unwrap();
        assert_eq!(host.blocks(0, 0, 3).collect::<Vec<_>>(), [0, 1], "{device:?}");
    }
}
