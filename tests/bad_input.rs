//! Every bad input is answered by a typed error that says the limit and the value got, or by the
//! documented result; never by a panic, a hang or a wrong number. Numbered after the list of the
//! project's notes; rank (1) is checked by the type `Tensor<4>`, files are in the models' tests.

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, BlockSelection, PrismCache, PrismConfig, PrismError,
    SelectedBlocks, SequenceLengths, block_sparse_attention, dense_attention, plan,
    prism_attention, select_blocks,
};
use rstest::rstest;
use tests::{Inputs, Kind, all_devices, tensor, values};

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
