//! Every bad input is answered by a typed error that says the limit and the value got, or by the
//! documented result; never by a panic, a hang or a wrong number. Numbered after the list of the
//! project's notes; rank (1) is checked by the type `Tensor<4>`, files are in the models' tests.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, BlockSelection, Budget, GateUp, LinearOptions, PrismCache,
    PrismConfig, PrismError, Rope, RotaryTable, Scoring, SelectedBlocks, SequenceLengths,
    block_sparse_attention, dense_attention, interleave, linear, linear_with, plan, plan_linear,
    prism_attention, prism_attention_rotated, rotate_and_pool, select_blocks, swiglu,
};
use rstest::rstest;
use tests::{Inputs, Kind, all_devices, devices, grids, tensor, values};

type Dims = [usize; 4];

fn zeros(dims: Dims) -> Tensor<4> {
    Tensor::zeros(dims, &Device::flex())
}

/// Every entry point refuses alike.
fn refused(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions) -> PrismError {
    let config = PrismConfig::llama3().with_dense_below(0);
    let dense = dense_attention(q.clone(), k.clone(), v.clone(), options).unwrap_err();
    let prism = prism_attention(q, k, v, &config, options).unwrap_err();
    assert_eq!(dense, prism);
    dense
}

#[rstest]
#[case::q02_batch([2, 4, 8, 16], [1, 2, 8, 16], [1, 2, 8, 16], "batch of q is 2, but k has 1")]
#[case::v02_batch([2, 4, 8, 16], [2, 2, 8, 16], [1, 2, 8, 16], "batch of q is 2, but v has 1")]
#[case::q03_lengths([1, 4, 8, 16], [1, 2, 8, 16], [1, 2, 9, 16], "length of k is 8, but v has 9")]
#[case::q04_head_dim([1, 4, 8, 16], [1, 2, 8, 32], [1, 2, 8, 32], "head_dim of q is 16, but k has 32")]
#[case::q05_value_dim([1, 4, 8, 16], [1, 2, 8, 16], [1, 2, 8, 32], "head_dim of q is 16, but v has 32")]
#[case::q06_groups([1, 5, 8, 16], [1, 2, 8, 16], [1, 2, 8, 16], "multiple of kv heads, got 5 query and 2 kv")]
#[case::q06_kv_heads([1, 4, 8, 16], [1, 2, 8, 16], [1, 1, 8, 16], "heads of k is 2, but v has 1")]
#[case::q07_no_kv_heads([1, 4, 8, 16], [1, 0, 8, 16], [1, 0, 8, 16], "kv heads must be at least 1")]
#[case::q07_no_heads([1, 0, 8, 16], [1, 2, 8, 16], [1, 2, 8, 16], "query heads must be at least 1")]
#[case::q07_no_batch([0, 4, 8, 16], [0, 2, 8, 16], [0, 2, 8, 16], "batch must be at least 1")]
#[case::q07_no_head_dim([1, 4, 8, 0], [1, 2, 8, 0], [1, 2, 8, 0], "head_dim must be at least 1")]
fn q02_to_q07_shapes_that_do_not_fit(
    #[case] q: Dims,
    #[case] k: Dims,
    #[case] v: Dims,
    #[case] says: &str,
) {
    let error = refused(zeros(q), zeros(k), zeros(v), &AttentionOptions::default());
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn q08_no_queries_or_no_keys() {
    let options = AttentionOptions::default().with_lse();
    let config = PrismConfig::llama3().with_dense_below(0);
    for device in all_devices() {
        let zeros = |dims: Dims| Tensor::<4>::zeros(dims, &device);
        let kv = || zeros([1, 2, 5, 16]);
        let got = prism_attention(zeros([1, 4, 0, 16]), kv(), kv(), &config, &options).unwrap();
        assert_eq!(got.output.dims(), [1, 4, 0, 16]);
        let q = Tensor::<4>::ones([1, 4, 5, 16], &device);
        let none = || zeros([1, 2, 0, 16]);
        for got in [
            dense_attention(q.clone(), none(), none(), &options).unwrap(),
            {
                let got = prism_attention(q.clone(), none(), none(), &config, &options).unwrap();
                burn_prism::AttentionOutput { output: got.output, lse: got.lse }
            },
            {
                let selected = select_blocks(q.clone(), none(), &config, &options).unwrap();
                block_sparse_attention(q.clone(), none(), none(), &selected, &options).unwrap()
            },
        ] {
            assert!(values(got.output).iter().all(|&x| x == 0.0), "{device:?}");
            let lse = values(got.lse.unwrap());
            assert_eq!(lse, vec![f32::NEG_INFINITY; 20], "{device:?}");
        }
    }
}

#[test]
fn q09_more_queries_than_keys_leaves_leading_rows_empty() {
    let kv = [1, 1, 4, 16];
    let shape = AttentionShape::new([1, 2, 10, 16], kv, kv).unwrap();
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 1);
    for device in all_devices() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let got = dense_attention(q, k, v, &AttentionOptions::default().with_lse()).unwrap();
        let (out, lse) = (values(got.output), values(got.lse.unwrap()));
        assert!(out[..6 * 16].iter().all(|&x| x == 0.0));
        assert!(lse[..6].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(lse[6..10].iter().all(|x| x.is_finite()));
        // The first row that sees a key sees only that one.
        let right = &inputs.v[..16];
        assert!(out[6 * 16..7 * 16].iter().zip(right).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

#[test]
fn q10_one_query_is_dense() {
    let kv = [1, 1, 5000, 16];
    let shape = AttentionShape::new([1, 1, 1, 16], kv, kv).unwrap();
    let [q, k, v] =
        Inputs::random(shape, Kind::Normal, DType::F32, 1).tensors(DType::F32, &Device::flex());
    let config = PrismConfig::llama3().with_dense_below(0);
    let got = prism_attention(q, k, v, &config, &AttentionOptions::default()).unwrap();
    assert_eq!(got.report.path, burn_prism::Path::Dense);
    assert_eq!(got.report.density().unwrap(), 1.0);
}

#[test]
fn q15_tensors_on_different_devices() {
    let q = zeros([1, 2, 8, 16]);
    let k = Tensor::<4>::zeros([1, 1, 8, 16], &tests::ndarray());
    let error = refused(q, k.clone(), k, &AttentionOptions::default());
    assert_eq!(error, PrismError::Device { left: "q", right: "k" });
}

#[test]
fn q16_more_than_65535_heads_and_rows() {
    let (device, n) = (Device::flex(), 70_000);
    let shape = AttentionShape::new([1, n, 2, 1], [1, n, 2, 1], [1, n, 2, 1]).unwrap();
    let inputs = Inputs::random(shape, Kind::Normal, DType::F32, 1);
    let [q, k, v] = inputs.tensors(DType::F32, &device);
    let out = values(dense_attention(q, k, v, &AttentionOptions::default()).unwrap().output);
    let last = 2 * (n - 1);
    assert!((out[last] - inputs.v[last]).abs() < 1e-6);
}

/// 17: element offsets past 2³¹, by a stride rather than an allocation.
#[test]
fn q17_huge_strides() {
    // A broadcast batch of 2³³ elements that all lie in one small buffer.
    let small = tensor(&[1.0; 64 * 8], [1, 1, 64, 8], DType::F32, &Device::flex());
    let huge = small.expand([1, 1 << 24, 64, 8]);
    let last = huge.clone().narrow(1, (1 << 24) - 1, 1);
    let options = AttentionOptions::default();
    let got = dense_attention(last.clone(), last.clone(), last, &options).unwrap();
    assert!(values(got.output).iter().all(|&x| (x - 1.0).abs() < 1e-6));
    // And element counts that overflow are refused before anything is allocated.
    let dims = [usize::MAX / 4, 2, 8, 16];
    let error = AttentionShape::new(dims, dims, dims).unwrap_err();
    assert!(matches!(error, PrismError::TooLarge { .. }), "{error}");
}

#[rstest]
#[case::q18_longer_than_the_tensor(vec![9], vec![8], "query length of sequence 0 is 9, but the tensor holds only 8")]
#[case::q19_keys(vec![8], vec![9], "key length of sequence 0 is 9")]
#[case::q19_count(vec![8, 8], vec![8, 8], "each of 1 sequences, got 2")]
#[case::q19_none(vec![], vec![], "each of 1 sequences, got 0")]
fn q18_q19_lengths_that_do_not_fit(
    #[case] q: Vec<usize>,
    #[case] kv: Vec<usize>,
    #[case] says: &str,
) {
    let options = AttentionOptions::default().with_lengths(SequenceLengths::new(q, kv));
    let kv = zeros([1, 1, 8, 16]);
    let error = refused(zeros([1, 2, 8, 16]), kv.clone(), kv, &options);
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn q19_cumulative_lengths_that_decrease_or_do_not_start_at_0() {
    let error = SequenceLengths::from_cumulative(&[0, 5, 3], &[0, 5, 8]).unwrap_err();
    assert!(error.to_string().contains("must not decrease, got 3 after 5"), "{error}");
    assert!(SequenceLengths::from_cumulative(&[1, 5], &[0, 5]).is_err());
    assert!(SequenceLengths::from_cumulative(&[], &[]).is_err());
    let right = SequenceLengths::new(vec![5, 3], vec![4, 4]);
    assert_eq!(SequenceLengths::from_cumulative(&[0, 5, 8], &[0, 4, 8]).unwrap(), right);
}

#[test]
fn q20_mixed_element_types() {
    let q = zeros([1, 2, 8, 16]).cast(DType::F16);
    let k = zeros([1, 1, 8, 16]).cast(DType::BF16);
    let error = refused(q, k.clone(), k, &AttentionOptions::default());
    assert!(error.to_string().contains("k: element type BF16"), "{error}");
}

#[test]
fn q21_f64_and_quantised() {
    let q = zeros([1, 2, 8, 16]).cast(DType::F64);
    let k = zeros([1, 1, 8, 16]).cast(DType::F64);
    let error = refused(q, k.clone(), k, &AttentionOptions::default());
    assert!(error.to_string().contains("f32, f16 or bf16"), "{error}");
    let scheme = burn::tensor::quantization::QuantScheme::default();
    let quantised = Tensor::<4>::ones([1, 2, 32, 32], &Device::flex()).quantize_dynamic(&scheme);
    let options = AttentionOptions::default();
    let error = refused(quantised.clone(), quantised.clone(), quantised, &options);
    assert!(matches!(error, PrismError::DType { what: "q", .. }), "{error}");
}

#[test]
fn q22_an_element_type_that_the_device_lacks() {
    let kv = [1, 1, 8, 16];
    let shape = AttentionShape::new(kv, kv, kv).unwrap();
    let device = tests::ndarray();
    let missing =
        [DType::F16, DType::BF16].into_iter().find(|&dtype| !device.supports_dtype(dtype));
    let dtype = missing.expect("ndarray has no half precision");
    let error = plan(&PrismConfig::llama3(), &shape, None, dtype, &device).unwrap_err();
    assert!(matches!(error, PrismError::DType { .. }), "{error}");
    assert!(PrismCache::new(&shape, 8, 4, dtype, &device).is_err());
}

#[test]
fn q23_f32_beyond_half_precision_stays_f32() {
    let kv = [1, 1, 64, 16];
    let shape = AttentionShape::new(kv, kv, kv).unwrap();
    let mut inputs = Inputs::random(shape, Kind::Normal, DType::F32, 1);
    inputs.v.iter_mut().for_each(|x| *x *= 1e9);
    for device in all_devices() {
        let [q, k, v] = inputs.tensors(DType::F32, &device);
        let out = values(dense_attention(q, k, v, &AttentionOptions::default()).unwrap().output);
        assert!(out.iter().all(|x| x.is_finite()) && out.iter().any(|x| x.abs() > 65504.0));
    }
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

#[test]
fn q37_selections_of_ones_own() {
    let kv = [1, 1, 64, 16];
    let shape = AttentionShape::new([1, 1, 64, 16], kv, kv).unwrap();
    let device = Device::flex();
    let bring = |selection: &BlockSelection| {
        SelectedBlocks::from_host(selection, &shape, 16, None, &device).unwrap_err().to_string()
    };
    let of = |dims: Dims, lists: &[Vec<usize>]| BlockSelection::from_indices(dims, lists);
    let dims = [1, 1, 4, 4];
    let good = [vec![0], vec![1], vec![0, 2], vec![3]];
    SelectedBlocks::from_host(&of(dims, &good).unwrap(), &shape, 16, None, &device).unwrap();

    let wrong_shape = bring(&of([1, 1, 2, 4], &[vec![0], vec![1]]).unwrap());
    assert!(wrong_shape.contains("expected shape"), "{wrong_shape}");
    let empty = bring(&of(dims, &[vec![0], vec![], vec![0], vec![0]]).unwrap());
    assert!(empty.contains("head 0, row 1 reads no block"), "{empty}");
    let anti_causal = bring(&of(dims, &[vec![0], vec![2], vec![0], vec![0]]).unwrap());
    assert!(anti_causal.contains("row 1 reads key block 2"), "{anti_causal}");

    let index =
        |list: Vec<usize>| of(dims, &[list, vec![0], vec![0], vec![0]]).unwrap_err().to_string();
    assert!(index(vec![4]).contains("index 4 of line 0 is past the end"));
    assert!(index(vec![0, 0]).contains("must increase, got 0 after 0"));
    assert!(index(vec![1, 0]).contains("must increase, got 0 after 1"));
    assert!(of(dims, &good[..3]).is_err());
    assert!(BlockSelection::from_bools(dims, [true; 15]).is_err());
    assert!(BlockSelection::from_words(dims, vec![1, 1, 1, 1], vec![1, 1, 2, 1]).is_err());
    assert!(BlockSelection::from_words(dims, vec![1, 1, 1, 16], vec![1; 4]).is_err());
    assert!(BlockSelection::from_words(dims, vec![1; 3], vec![1; 4]).is_err());
}

#[test]
fn q37_a_selection_made_for_another_call() {
    let q = zeros([1, 2, 64, 16]);
    let kv = zeros([1, 1, 64, 16]);
    let config = PrismConfig::llama3().with_block(16);
    let options = AttentionOptions::default();
    let selected = select_blocks(q.clone(), kv.clone(), &config, &options).unwrap();
    let short = zeros([1, 1, 60, 16]);
    let error = block_sparse_attention(q, short.clone(), short, &selected, &options).unwrap_err();
    assert!(matches!(error, PrismError::Selection { .. }), "{error}");
}

fn cache_of(capacity: usize) -> PrismCache {
    let kv = [1, 2, capacity, 16];
    let shape = AttentionShape::new([1, 4, capacity, 16], kv, kv).unwrap();
    PrismCache::new(&shape, capacity, 16, DType::F32, &Device::flex()).unwrap()
}

#[test]
fn q38_appending_past_capacity_changes_nothing() {
    let mut cache = cache_of(40);
    cache.append(zeros([1, 2, 30, 16]), zeros([1, 2, 30, 16])).unwrap();
    let error = cache.append(zeros([1, 2, 11, 16]), zeros([1, 2, 11, 16])).unwrap_err();
    assert!(error.to_string().contains("11 more positions don't fit: 30 of 40"), "{error}");
    let attention = PrismConfig::llama3().with_block(16).init();
    let call = |cache: &mut PrismCache, n: usize| {
        let kv = zeros([1, 2, n, 16]);
        let options = AttentionOptions::default();
        attention.forward_cached(zeros([1, 4, n, 16]), kv.clone(), kv, cache, &options)
    };
    assert!(call(&mut cache, 11).is_err());
    assert_eq!(cache.len(), 30);
    call(&mut cache, 10).unwrap();
    assert_eq!(cache.len(), 40);
}

#[test]
fn q41_a_batch_or_shape_that_changes_between_calls() {
    let mut cache = cache_of(40);
    let batch = cache.append(zeros([2, 2, 3, 16]), zeros([2, 2, 3, 16])).unwrap_err();
    assert!(batch.to_string().contains("batch of k is 2, but the cache has 1"), "{batch}");
    assert!(cache.append(zeros([1, 1, 3, 16]), zeros([1, 1, 3, 16])).is_err());
    assert!(cache.append(zeros([1, 2, 3, 16]), zeros([1, 2, 4, 16])).is_err());
    let half = || zeros([1, 2, 3, 16]).cast(DType::F16);
    assert!(cache.append(half(), half()).is_err());
    let attention = PrismConfig::llama3().with_block(16).init();
    let kv = || zeros([1, 2, 3, 16]);
    let options = AttentionOptions::default();
    let error = attention
        .forward_cached(zeros([1, 6, 3, 16]), kv(), kv(), &mut cache, &options)
        .unwrap_err();
    assert!(error.to_string().contains("heads of q is 6, but the cache has 4"), "{error}");
    let other_block = PrismConfig::llama3().with_block(32).init();
    let error = other_block
        .forward_cached(zeros([1, 4, 3, 16]), kv(), kv(), &mut cache, &options)
        .unwrap_err();
    assert!(matches!(error, PrismError::Cache { .. }), "{error}");
    assert!(cache.is_empty());
}

#[test]
fn weights_that_do_not_fit() {
    let device = Device::flex();
    let matrix = |rows, columns| Tensor::<2>::zeros([rows, columns], &device);
    let x = || Tensor::<3>::zeros([2, 5, 16], &device);
    let says = |error: PrismError, text: &str| assert_eq!(error.to_string(), text);

    says(linear(x(), matrix(24, 16)).unwrap_err(), "weight must be [16, 16], got [24, 16]");
    says(linear(x(), matrix(16, 0)).unwrap_err(), "columns of a weight must be at least 1, got 0");
    let none = Tensor::<3>::zeros([2, 5, 0], &device);
    says(linear(none, matrix(0, 8)).unwrap_err(), "columns of x must be at least 1, got 0");
    let half = matrix(16, 24).cast(DType::F16);
    let error = linear(x(), half).unwrap_err();
    says(error, "weight: element type F16 is not supported, expected that of x");
    let elsewhere = Tensor::<2>::zeros([16, 24], &tests::ndarray());
    let error = linear(x(), elsewhere).unwrap_err();
    assert_eq!(error, PrismError::Device { left: "x", right: "weight" });

    let with = |options| linear_with(x(), matrix(16, 24), options).unwrap_err();
    let bias = Tensor::<1>::zeros([23], &device);
    says(with(LinearOptions::default().with_bias(bias)), "bias must be [24], got [23]");
    let options = LinearOptions::default().with_residual(x());
    says(with(options), "residual must be [2, 5, 24], got [2, 5, 16]");
    says(plan_linear([5, 0, 8], DType::F32, &device).unwrap_err(), "K must be at least 1, got 0");
    says(plan_linear([5, 8, 0], DType::F32, &device).unwrap_err(), "N must be at least 1, got 0");

    let error = GateUp::new(matrix(16, 24), matrix(16, 32)).unwrap_err();
    says(error, "up must be [16, 24], got [16, 32]");
    let error = interleave(matrix(16, 20), matrix(16, 20)).unwrap_err();
    says(error, "F must be a multiple of 8, got 20");
    assert!(GateUp::new(matrix(16, 24), matrix(16, 24).cast(DType::F16)).is_err());
    let narrow = |made: fn(Tensor<2>, Tensor<2>) -> burn_prism::Result<GateUp>| {
        swiglu(x(), &made(matrix(8, 24), matrix(8, 24)).unwrap()).unwrap_err()
    };
    says(narrow(GateUp::new), "gate must be [16, 24], got [8, 24]");
    says(narrow(GateUp::interleaved), "gate and up must be [16, 48], got [8, 48]");
}

#[test]
fn rotary_tables_that_do_not_fit() {
    let device = Device::flex();
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
