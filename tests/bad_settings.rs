//! Are settings that make no sense refused, by every call that uses them and by `plan` alike, with the
//! limit and the value got? Numbered after the list of the project's notes.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, Budget, PrismCache, PrismConfig, PrismError, Rope, Scoring,
    dense_attention, plan, prism_attention, select_blocks,
};
use rstest::rstest;
use tests::{Inputs, Kind, all_devices, devices, grids};

fn zeros(dims: [usize; 4]) -> Tensor<4> {
    Tensor::zeros(dims, &Device::flex())
}

/// Settings are refused by every call that uses them, and by `plan`, with the same error.
fn config_refused(config: &PrismConfig) -> PrismError {
    let kv = [1, 1, 8, 64];
    let shape = AttentionShape::new([1, 2, 8, 64], kv, kv).unwrap();
    let (q, kv) = (zeros([1, 2, 8, 64]), zeros(kv));
    let options = AttentionOptions::default();
    let error = prism_attention(q.clone(), kv.clone(), kv.clone(), config, &options).unwrap_err();
    let planned = plan(config, &shape, None, DType::F32, &Device::flex()).unwrap_err();
    // NaN is not equal to itself: compare what is said.
    assert_eq!(error.to_string(), planned.to_string());
    if config.scale.is_none() {
        let selected = select_blocks(q, kv, config, &options).unwrap_err();
        assert_eq!(error.to_string(), selected.to_string());
    }
    error
}

#[rstest]
fn q31_mass(#[values(0.0, -0.5, 1.0001, f64::NAN, f64::INFINITY)] mass: f64) {
    let error = config_refused(&PrismConfig::llama3().with_mass(mass));
    assert!(error.to_string().contains("mass must be above 0 and at most 1"), "{error}");
}

#[test]
fn q31_top_k_and_limits() {
    let mut config = PrismConfig::llama3();
    config.selection.budget = Budget::TopK(0);
    assert!(config_refused(&config).to_string().contains("top_k must be at least 1, got 0"));
    let mut config = PrismConfig::llama3();
    (config.selection.min_blocks, config.selection.max_blocks) = (5, Some(4));
    assert!(config_refused(&config).to_string().contains("min_blocks must be at most max_blocks"));
}

#[rstest]
#[case(33, 48)]
#[case(66, 48)]
#[case(32, 47)]
#[case(32, 66)]
#[case(0, 0)]
fn q32_bands(#[case] high: usize, #[case] low: usize) {
    let error = config_refused(&PrismConfig::llama3().with_bands(high, low));
    assert!(matches!(error, PrismError::Bands { .. }), "{error}");
}

#[rstest]
#[case(64, 64)]
#[case(2, 2)]
#[case(0, 64)]
#[case(64, 0)]
fn q32_bands_that_overlap_or_leave_dims_out_work(#[case] high: usize, #[case] low: usize) {
    let config = PrismConfig::llama3().with_bands(high, low).with_dense_below(0).with_block(4);
    let kv = [1, 1, 40, 64];
    let shape = AttentionShape::new([1, 2, 40, 64], kv, kv).unwrap();
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 1);
    for device in if high == 0 { all_devices() } else { devices() } {
        let [q, k, _] = inputs.tensors(DType::F32, &device);
        let got = select_blocks(q, k, &config, &AttentionOptions::default()).unwrap();
        got.to_host().unwrap().validate(&grids(&shape, 4), 2).unwrap();
    }
}

#[rstest]
fn q33_block_sizes(#[values(0, (1 << 20) + 1, usize::MAX)] block: usize) {
    let error = config_refused(&PrismConfig::llama3().with_block(block));
    assert!(matches!(error, PrismError::BlockSize { .. }), "{error}");
}

#[rstest]
#[case(128, 32, 8, "key_sub must be 16 to 128 and divide the block of 128, got 8")]
#[case(128, 48, 16, "query_sub must be 16 to 128 and divide the block of 128, got 48")]
#[case(64, 128, 16, "query_sub must be 16 to 128 and divide the block of 64, got 128")]
#[case(8, 8, 16, "key_sub must be 8 like the block, got 16")]
fn q33_sub_blocks(
    #[case] block: usize,
    #[case] query_sub: usize,
    #[case] key_sub: usize,
    #[case] says: &str,
) {
    let scoring = Scoring::SecondOrder { query_sub, key_sub };
    let config = PrismConfig::llama3().with_block(block).with_scoring(scoring);
    assert_eq!(config_refused(&config).to_string(), says);
}

#[test]
fn q32_bands_of_a_scoring_that_has_none() {
    let config = PrismConfig::llama3().with_scoring(Scoring::second_order()).with_bands(32, 48);
    let error = config_refused(&config);
    assert!(error.to_string().contains("second-order scoring has none to set"), "{error}");
}

#[test]
fn q36_scoring_survives_json() {
    let config = PrismConfig::llama3().with_scoring(Scoring::second_order());
    let json = serde_json::to_string(&config).unwrap();
    assert!(json.contains(r#""scoring":{"second_order":{"query_sub":32,"key_sub":16}}"#), "{json}");
    assert_eq!(serde_json::from_str::<PrismConfig>(&json).unwrap(), config);
    let bands = r#"{"rope": {"theta": 1e4}, "scoring": "bands"}"#;
    let bands: PrismConfig = serde_json::from_str(bands).unwrap();
    assert_eq!(bands, PrismConfig::new(Rope::new(1e4)));
}

/// More blocks than a row's softmax can sum exactly: refused by what selects, not by dense.
#[test]
fn q33_more_blocks_than_a_row_can_have() {
    let n = 65_537;
    let kv = [1, 1, n, 4];
    let shape = AttentionShape::new([1, 1, 2, 4], kv, kv).unwrap();
    let config = PrismConfig::llama3().with_block(1).with_bands(2, 2).with_dense_below(0);
    let options = AttentionOptions::default();
    let (q, k) = (zeros([1, 1, 2, 4]), zeros(kv));
    let error = select_blocks(q.clone(), k.clone(), &config, &options).unwrap_err();
    assert_eq!(error, PrismError::RowBlocks { limit: 65_536, got: n });
    let planned = plan(&config, &shape, None, DType::F32, &Device::flex()).unwrap_err();
    let called = prism_attention(q.clone(), k.clone(), k.clone(), &config, &options).unwrap_err();
    assert_eq!([&planned, &called], [&error; 2]);
    let mut cache = PrismCache::new(&shape, n, 1, DType::F32, &Device::flex()).unwrap();
    let cached =
        config.init().forward_cached(q.clone(), k.clone(), k.clone(), &mut cache, &options);
    assert_eq!((cached.unwrap_err(), cache.len()), (error, 0));
    dense_attention(q, k.clone(), k, &options).unwrap();
}

#[rstest]
fn q34_scale(#[values(0.0, -1.0, f64::NAN, f64::INFINITY)] scale: f64) {
    let config = PrismConfig { scale: Some(scale), ..PrismConfig::llama3() };
    let error = config_refused(&config);
    assert!(error.to_string().contains("scale must be finite and above 0"), "{error}");
    let options = AttentionOptions::default().with_scale(scale);
    let kv = zeros([1, 1, 8, 64]);
    let error = dense_attention(zeros([1, 2, 8, 64]), kv.clone(), kv, &options).unwrap_err();
    assert!(matches!(error, PrismError::OutOfRange { name: "scale", .. }), "{error}");
}

/// 35: a layout can't be checked against a model's numbers, but it acts: other dims, other blocks.
#[test]
fn q35_rope_layout_acts() {
    let half = PrismConfig::new(Rope::new(1e6));
    let interleaved = Rope { layout: burn_prism::RopeLayout::Interleaved, ..Rope::new(1e6) };
    let interleaved = PrismConfig::new(interleaved);
    let (half, interleaved) = (half.validate(64).unwrap(), interleaved.validate(64).unwrap());
    assert_ne!(half.high(), interleaved.high());
    let refused = Rope { rotary_dim: Some(66), ..Rope::new(1e4) };
    assert!(matches!(config_refused(&PrismConfig::new(refused)), PrismError::Rope { .. }));
}

#[rstest]
#[case::unknown(r#"{"rope": {"theta": 1e4}, "mas": 0.9}"#)]
#[case::unknown_inside(r#"{"rope": {"theta": 1e4, "tetha": 1}}"#)]
#[case::unknown_in_selection(r#"{"rope": {"theta": 1e4}, "selection": {"sink": 1}}"#)]
#[case::wrong_type(r#"{"rope": {"theta": "1e4"}}"#)]
#[case::negative(r#"{"rope": {"theta": 1e4}, "block": -1}"#)]
#[case::missing(r#"{"block": 128}"#)]
#[case::unknown_scoring(r#"{"rope": {"theta": 1e4}, "scoring": "third_order"}"#)]
#[case::unknown_in_scoring(
    r#"{"rope": {"theta": 1e4}, "scoring": {"second_order": {"query_sub": 32, "key": 16}}}"#
)]
#[case::not_json("block = 128")]
#[case::empty("")]
fn q36_configs_that_do_not_parse(#[case] json: &str) {
    assert!(serde_json::from_str::<PrismConfig>(json).is_err());
}

#[test]
fn q36_depth_bombs_and_huge_configs() {
    let bomb = format!(r#"{{"rope": {}"#, r#"{"theta": "#.repeat(100_000));
    assert!(serde_json::from_str::<PrismConfig>(&bomb).is_err());
    let huge = format!(r#"{{"rope": {{"theta": 1e4}}, "{}": 1}}"#, "x".repeat(10 << 20));
    assert!(serde_json::from_str::<PrismConfig>(&huge).is_err());
}
