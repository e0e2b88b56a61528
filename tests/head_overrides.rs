//! Does a head with settings of its own select what a layer with these settings selects for it, bit for
//! bit, whichever way a call comes in? And do the other heads notice nothing?

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, BandRule, BlockSelection, Calibration, HeadOverride,
    PrismCache, PrismConfig, PrismError, PrismOutput, RotaryTable, Scoring, SelectorConfig,
    SequenceLengths, Step, block_sparse_attention, plan, plan_rotated, prism_attention,
    prism_attention_rotated, rotate_and_pool, select_blocks,
};
use prism_core::selectors::Prism;
use rstest::rstest;
use tests::{Inputs, Kind, all_devices, devices, devices_and_wgpu, values};

const BLOCK: usize = 16;
const LEN: usize = 300;
const HEADS: usize = 6;
const SECOND_ORDER: Scoring = Scoring::SecondOrder { query_sub: 16, key_sub: 16 };

fn shape() -> AttentionShape {
    let kv = [2, 2, LEN, 64];
    AttentionShape::new([2, HEADS, LEN, 64], kv, kv).unwrap()
}

fn layer() -> PrismConfig {
    PrismConfig::smollm2().with_block(BLOCK).with_mass(0.7).with_dense_below(0)
}

/// Heads of one kv head with different settings, given out of order, and settings that two share; bands
/// where the layer has some.
fn overrides(layer: &PrismConfig) -> Vec<HeadOverride> {
    let mut overrides = vec![
        HeadOverride::new([5]).with_mass(0.9),
        HeadOverride::new([2, 0]).with_mass(0.4),
        HeadOverride::new([1]).with_max_blocks(3),
        HeadOverride::new([3]).with_mass(1.0),
    ];
    if layer.scoring == Scoring::Bands {
        overrides[0] = overrides[0].clone().with_bands(16, 0);
        overrides.push(HeadOverride::new([4]).with_bands(48, 20));
    }
    overrides
}

fn with_overrides(layer: &PrismConfig) -> PrismConfig {
    overrides(layer).into_iter().fold(layer.clone(), PrismConfig::with_heads)
}

/// The layer that has the settings of one head for all.
fn alike(layer: &PrismConfig, head: usize) -> PrismConfig {
    let mut config = layer.clone();
    if let Some(own) = overrides(layer).iter().find(|one| one.heads.contains(&head)) {
        config = own.mass.map_or(config.clone(), |mass| config.with_mass(mass));
        config.bands = own.bands.unwrap_or(config.bands);
        config.selection.max_blocks = own.max_blocks;
    }
    config
}

/// Asserts that each head reads what the layer that is all like it reads there.
fn assert_heads(
    what: &str,
    layer: &PrismConfig,
    select: impl Fn(&PrismConfig) -> Vec<BlockSelection>,
) {
    let got = select(&with_overrides(layer));
    for head in 0..HEADS {
        let right = select(&alike(layer, head));
        assert_eq!(got.len(), right.len());
        for (got, right) in got.iter().zip(&right) {
            let [batch, _, rows, _] = got.shape();
            assert_eq!(got.shape(), right.shape());
            for (b, row) in (0..batch).flat_map(|b| (0..rows).map(move |row| (b, row))) {
                assert_eq!(
                    (got.row_words(b, head, row), got.count(b, head, row)),
                    (right.row_words(b, head, row), right.count(b, head, row)),
                    "{what}: batch {b}, head {head}, row {row}"
                );
            }
        }
    }
    // Or else nothing was overridden at all.
    assert_ne!(got, select(layer), "{what}");
}

fn host(output: PrismOutput) -> BlockSelection {
    output.report.selected.expect("nothing was selected").to_host().unwrap()
}

fn selected(config: &PrismConfig, inputs: &Inputs, device: &Device) -> Vec<BlockSelection> {
    let [q, k, _] = inputs.tensors(DType::F32, device);
    let selected = select_blocks(q, k, config, &AttentionOptions::default()).unwrap();
    vec![selected.to_host().unwrap()]
}

#[rstest]
#[case(layer())]
#[case(layer().with_calibration(Calibration::Causal))]
#[case(layer().with_calibration(Calibration::Off).with_bands(32, 48))]
#[case(layer().with_scoring(SECOND_ORDER))]
fn heads_select_as_layers_of_their_settings(#[case] layer: PrismConfig) {
    for kind in [Kind::Normal, Kind::HeavyTailed] {
        let inputs = Inputs::random(shape(), kind, DType::F32, 4);
        for device in devices() {
            let what = format!("{device:?}, {kind:?}");
            assert_heads(&what, &layer, |config| selected(config, &inputs, &device));
        }
    }
}

#[rstest]
#[case(layer())]
#[case(layer().with_scoring(SECOND_ORDER))]
fn heads_select_as_layers_of_their_settings_on_every_device(#[case] layer: PrismConfig) {
    let kv = [1, 2, 80, 64];
    let shape = AttentionShape::new([1, HEADS, 80, 64], kv, kv).unwrap();
    let inputs = Inputs::random(shape, Kind::HeavyTailed, DType::F32, 5);
    for device in all_devices() {
        let what = format!("{device:?}");
        assert_heads(&what, &layer, |config| selected(config, &inputs, &device));
    }
}

#[test]
fn heads_of_ragged_batches_select_as_layers_of_their_settings() {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 6);
    let options = AttentionOptions::default()
        .with_lengths(SequenceLengths::new(vec![120, 300], vec![200, 300]));
    for device in devices_and_wgpu() {
        assert_heads("ragged", &layer(), |config| {
            let [q, k, v] = inputs.tensors(DType::F32, &device);
            vec![host(prism_attention(q, k, v, config, &options).unwrap())]
        });
    }
}

/// Chunks select from pooled keys of the cache and the energies of earlier queries.
#[rstest]
#[case(layer().with_calibration(Calibration::Causal))]
#[case(layer())]
#[case(layer().with_scoring(SECOND_ORDER))]
fn heads_of_chunks_select_as_layers_of_their_settings(#[case] layer: PrismConfig) {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 7);
    for device in devices_and_wgpu() {
        assert_heads("chunks", &layer, |config| {
            let mut cache = PrismCache::new(&shape(), LEN, BLOCK, DType::F32, &device).unwrap();
            let tensors = inputs.tensors(DType::F32, &device);
            let chunk = |(start, len): (usize, usize)| {
                let [q, k, v] = tensors.clone().map(|x| x.narrow(2, start, len));
                let more = AttentionOptions::default().with_more_follows(start + len < LEN);
                host(config.init().forward_cached(q, k, v, &mut cache, &more).unwrap())
            };
            [(0, 160), (160, 140)].map(chunk).into()
        });
    }
}

#[rstest]
fn heads_before_their_rotation_select_as_layers_of_their_settings(
    #[values(Scoring::Bands, SECOND_ORDER)] scoring: Scoring,
) {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 8);
    let layer = layer().with_scoring(scoring);
    for device in devices_and_wgpu() {
        let table = RotaryTable::new(&layer.rope, 64, LEN, &device).unwrap();
        assert_heads("cached", &layer, |config| {
            let mut cache = PrismCache::new(&shape(), LEN, BLOCK, DType::F32, &device).unwrap();
            let [q, k, v] = inputs.tensors(DType::F32, &device);
            let (attention, options) = (config.init(), AttentionOptions::default());
            let output = attention.forward_with_rope(q, k, v, &table, &mut cache, &options);
            vec![host(output.unwrap())]
        });
        assert_heads("rotated", &layer, |config| {
            let [q, k, v] = inputs.tensors(DType::F32, &device);
            let options = AttentionOptions::default();
            let rotated = rotate_and_pool(q, k, &table, config, &options).unwrap();
            vec![host(prism_attention_rotated(rotated, v).unwrap())]
        });
    }
}

/// What is attended is what the report says was selected.
#[test]
fn attention_reads_what_the_heads_select() {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 9);
    for device in devices() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let (config, options) = (with_overrides(&layer()), AttentionOptions::default());
        let output = prism_attention(q.clone(), k.clone(), v.clone(), &config, &options).unwrap();
        let own = output.report.selected.unwrap();
        let right = block_sparse_attention(q, k, v, &own, &options).unwrap();
        assert_eq!(values(output.output), values(right.output));
        let density = own.density_by_head().unwrap();
        assert_eq!((density[3], density[HEADS + 3]), (1.0, 1.0));
        assert!(density[0] < density[4] && density[4] < density[5], "{density:?}");
    }
}

/// A selection is a choice and has no gradient; what is attended has.
#[test]
fn heads_select_alike_where_gradients_are_tracked() {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 11);
    let (config, options) = (with_overrides(&layer()), AttentionOptions::default());
    for device in devices() {
        let right = selected(&config, &inputs, &device);
        let [q, k, v] = inputs.tensors(DType::F32, &device.autodiff()).map(Tensor::require_grad);
        let output = prism_attention(q.clone(), k, v, &config, &options).unwrap();
        let gradients = output.output.clone().sum().backward();
        assert!(values(q.grad(&gradients).unwrap()).iter().any(|&x| x != 0.0));
        assert_eq!(vec![host(output)], right);
    }
}

/// Where every head has the same settings, they may stand in either place: one selection is made.
#[test]
fn overrides_of_every_head_are_the_layers_settings() {
    let inputs = Inputs::random(shape(), Kind::Normal, DType::F32, 10);
    let every = layer().with_heads(HeadOverride::new([0, 1, 2, 3, 4, 5]).with_mass(0.9));
    for device in devices() {
        let right = selected(&layer().with_mass(0.9), &inputs, &device);
        assert_eq!(selected(&every, &inputs, &device), right);
    }
    let plan = plan(&every, &shape(), None, DType::F32, &Device::flex()).unwrap();
    assert_eq!(plan.steps, [Step::Pool, Step::Select, Step::Attend]);
}

#[test]
fn plans_tell_of_every_selection() {
    let planned = |config: &PrismConfig| plan(config, &shape(), None, DType::F32, &Device::flex());
    let (plain, own) = (planned(&layer()).unwrap(), planned(&with_overrides(&layer())).unwrap());
    assert_eq!(plain.steps, [Step::Pool, Step::Select, Step::Attend]);
    // Heads 0 and 2 have the same, every other one has its own.
    let selects = [Step::Select; 5];
    assert_eq!(own.steps, [&[Step::Pool][..], &selects, &[Step::Attend]].concat());
    assert!(own.bytes > plain.bytes);
    let rotated =
        plan_rotated(&with_overrides(&layer()), &shape(), None, DType::F32, &Device::flex());
    assert_eq!(rotated.unwrap().steps, [&[Step::Rotate][..], &own.steps].concat());
    let dense = with_overrides(&layer()).with_dense_below(LEN + 1);
    assert_eq!(planned(&dense).unwrap().steps, [Step::Attend]);
}

/// Every call refuses them, with or without a selection, and a cache is unchanged then.
#[rstest]
#[case(HeadOverride::new([6]).with_mass(0.5), "there is no query head 6: there are 6")]
#[case(HeadOverride::new([1, 1]).with_mass(0.5), "query head 1 must be named at most once")]
#[case(HeadOverride::new([]).with_mass(0.5), "override 0 must name at least 1 head, got 0")]
#[case(HeadOverride::new([1]), "override 0, of heads [1], sets nothing")]
#[case(HeadOverride::new([1]).with_mass(1.5), "mass must be above 0 and at most 1, got 1.5")]
#[case(HeadOverride::new([1]).with_mass(f64::NAN), "mass must be above 0 and at most 1, got NaN")]
#[case(HeadOverride::new([1]).with_max_blocks(0), "max_blocks must be at least 1, got 0")]
#[case(
    HeadOverride::new([1]).with_bands(15, 0),
    "heads [1]: bands: high_dims must be even and at most the rotary dim (64), got 15"
)]
#[case(HeadOverride::new([1]).with_bands(0, 66), "low_dims must be at most head_dim (64)")]
#[case(
    HeadOverride::new([1]).with_min_blocks(9).with_max_blocks(8),
    "min_blocks must be at most max_blocks, got 9"
)]
fn overrides_that_make_no_sense_are_refused(
    #[case] bad: HeadOverride,
    #[case] says: &str,
    #[values(0, LEN + 1)] dense_below: usize,
) {
    let config = layer().with_dense_below(dense_below).with_heads(bad);
    let (device, options) = (Device::flex(), AttentionOptions::default());
    let zeros = |heads| Tensor::<4>::zeros([2, heads, LEN, 64], &device);
    let (q, kv) = (zeros(HEADS), zeros(2));
    let mut cache = PrismCache::new(&shape(), LEN, BLOCK, DType::F32, &device).unwrap();
    let table = RotaryTable::new(&config.rope, 64, LEN, &device).unwrap();
    let attention = config.init();
    let errors: [PrismError; 6] = [
        select_blocks(q.clone(), kv.clone(), &config, &options).unwrap_err(),
        prism_attention(q.clone(), kv.clone(), kv.clone(), &config, &options).unwrap_err(),
        rotate_and_pool(q.clone(), kv.clone(), &table, &config, &options).unwrap_err(),
        plan(&config, &shape(), None, DType::F32, &device).unwrap_err(),
        attention
            .forward_cached(q.clone(), kv.clone(), kv.clone(), &mut cache, &options)
            .unwrap_err(),
        attention.forward_with_rope(q, kv.clone(), kv, &table, &mut cache, &options).unwrap_err(),
    ];
    for error in errors {
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(cache.is_empty());
}

#[test]
fn overrides_that_name_a_head_twice_are_refused() {
    let config = layer()
        .with_heads(HeadOverride::new([4, 2]).with_mass(0.5))
        .with_heads(HeadOverride::new([0, 2]).with_max_blocks(4));
    let error = config.validate_for(HEADS, 64).unwrap_err().to_string();
    assert_eq!(error, "head overrides: query head 2 must be named at most once, got twice");
    assert_eq!(config.validate(64).unwrap_err().to_string(), error);
}

#[rstest]
#[case(layer().with_scoring(SECOND_ORDER))]
#[case(layer().with_selector(SelectorConfig::Streaming(Default::default())))]
#[case(layer().with_selector(SelectorConfig::Prism(Prism { pool_block: Some(16), ..Prism::default() })))]
fn bands_of_heads_are_refused_where_scores_have_none(
    #[case] layer: PrismConfig,
    #[values(BandRule::Auto, BandRule::Dims { high: 16, low: 48 })] bands: BandRule,
) {
    let own = HeadOverride { bands: Some(bands), ..HeadOverride::new([1, 4]) };
    let error = layer.with_heads(own).validate_for(HEADS, 64).unwrap_err().to_string();
    let says = "head overrides: heads [1, 4]: only Prism's own scoring has bands of heads";
    assert_eq!(error, says);
}

#[test]
fn overrides_survive_json_and_unknown_ones_are_refused() {
    let config = with_overrides(&layer());
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<PrismConfig>(&json).unwrap(), config);
    assert!(!serde_json::to_string(&layer()).unwrap().contains("heads"));
    let scoring = r#"{"rope": {"theta": 1e4}, "heads": [{"heads": [0], "scoring": "bands"}]}"#;
    let error = serde_json::from_str::<PrismConfig>(scoring).unwrap_err().to_string();
    assert!(error.contains("unknown field `scoring`, expected one of `heads`, `mass`"), "{error}");
}
