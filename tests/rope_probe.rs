//! Does the probe find out how a model rotates? A config with the wrong RoPE computes something and
//! fails nowhere, so the probe must tell every mistake that users make from a right rotation.

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_prism::{
    HeadOverride, PrismConfig, PrismError, Result, Rope, RopeLayout, RopeMismatch, RopeProbe,
    RopeScaling, Scoring, SelectorConfig, probe_rope,
};
use rstest::rstest;

const HEAD_DIM: usize = 64;

/// The rotation by `rope`, written out on the host: the model's own code.
fn rotate(rope: &Rope, x: Tensor<4>, first: usize) -> Tensor<4> {
    let shape = x.dims();
    let [_, heads, rows, head_dim] = shape;
    let (rotary, inv_freq) = (rope.rotary_dim(head_dim).unwrap(), rope.inv_freq(head_dim).unwrap());
    let device = x.device();
    let mut values = x.into_data().try_into_vec::<f32>().unwrap();
    for (i, row) in values.chunks_exact_mut(head_dim).enumerate() {
        let position = (first + i % rows) as f64;
        for (j, f) in inv_freq.iter().enumerate() {
            let [a, b] = rope.pair(j, rotary);
            let (sin, cos) = (position * f).sin_cos();
            let (sin, cos) =
                ((sin * rope.attention_factor()) as f32, (cos * rope.attention_factor()) as f32);
            (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
        }
    }
    assert_eq!(values.len(), heads * rows * head_dim);
    Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32))
}

fn probe(config: Rope, model: Rope) -> Result<RopeProbe, RopeMismatch> {
    probe_config(&PrismConfig::new(config), |x, first| rotate(&model, x, first))
}

fn probe_config(
    config: &PrismConfig,
    model: impl FnMut(Tensor<4>, usize) -> Tensor<4>,
) -> Result<RopeProbe, RopeMismatch> {
    probe_rope(config, HEAD_DIM, &Device::flex(), model)
}

fn interleaved(rope: Rope) -> Rope {
    Rope { layout: RopeLayout::Interleaved, ..rope }
}

fn llama3_1() -> Rope {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 8192,
    };
    Rope { scaling, ..Rope::new(5e5) }
}

fn yarn() -> Rope {
    let scaling = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_positions: 32768,
        attention_factor: None,
    };
    Rope { scaling, ..Rope::new(1e6) }
}

#[rstest]
#[case::llama2(Rope::new(1e4))]
#[case::llama3(Rope::new(5e5))]
#[case::slow(Rope::new(1e7))]
#[case::of_burn(interleaved(Rope::new(1e4)))]
#[case::half_of_the_head(Rope { rotary_dim: Some(32), ..Rope::new(1e4) })]
#[case::one_pair(Rope { rotary_dim: Some(2), ..Rope::new(1e4) })]
#[case::none(Rope { rotary_dim: Some(0), ..Rope::new(1e4) })]
#[case::linear(Rope { scaling: RopeScaling::Linear { factor: 4.0 }, ..Rope::new(1e4) })]
#[case::llama3_1(llama3_1())]
#[case::yarn(yarn())]
fn are_right_rotations_accepted(#[case] rope: Rope) {
    let found = probe(rope, rope).unwrap();
    assert_eq!(found.layout, rope.layout);
    assert_eq!(found.rotary_dim, rope.rotary_dim(HEAD_DIM).unwrap());
    for (got, expected) in found.inv_freq.iter().zip(rope.inv_freq(HEAD_DIM).unwrap()) {
        assert!((got / expected - 1.0).abs() < 1e-3, "{got} and {expected}");
    }
    assert!((found.attention_factor - rope.attention_factor()).abs() < 1e-3);
    assert_eq!(found.bands, PrismConfig::new(rope).validate(HEAD_DIM).unwrap());
}

#[rstest]
#[case(DType::BF16)]
#[case(DType::F16)]
fn is_a_rotation_in_half_precision_accepted(#[case] dtype: DType) {
    for rope in [Rope::new(5e5), interleaved(llama3_1()), yarn()] {
        let rounded = |x, first| rotate(&rope, x, first).cast(dtype).cast(DType::F32);
        probe_config(&PrismConfig::new(rope), rounded).unwrap();
    }
}

#[test]
fn is_the_models_own_rotation_accepted() {
    let rope = llama3_1();
    let rotation = |x: Tensor<4>, first| {
        let (inv_freq, factor) = (rope.inv_freq(HEAD_DIM).unwrap(), rope.attention_factor());
        let at = (DType::F32, &x.device());
        prism_models::rope::Rotation::new(&inv_freq, factor, first, x.dims()[2], at).apply(x)
    };
    probe_config(&PrismConfig::new(rope), rotation).unwrap();
}

#[test]
fn is_the_other_layout_found() {
    for rope in [Rope::new(1e4), llama3_1(), yarn()] {
        let error = probe(rope, interleaved(rope)).unwrap_err();
        let RopeMismatch::Layout { expected, got, bands } = error.clone() else {
            panic!("{error}")
        };
        assert_eq!((expected, got), (RopeLayout::RotateHalf, RopeLayout::Interleaved));
        // Half of the dims, give or take, lie in the other band, or in both of them.
        assert!(bands.dims >= HEAD_DIM / 4, "{error}");
        assert_eq!(error.wrong_dims(), Some(bands.dims));
        let back = probe(interleaved(rope), rope).unwrap_err();
        assert!(matches!(back, RopeMismatch::Layout { got: RopeLayout::RotateHalf, .. }), "{back}");
    }
}

#[test]
fn is_another_theta_found() {
    let error = probe(Rope::new(5e5), Rope::new(1e4)).unwrap_err();
    let RopeMismatch::Frequency { pair, expected, got, theta, bands } = error.clone() else {
        panic!("{error}")
    };
    assert_eq!(pair, HEAD_DIM / 2 - 1);
    assert!((got / 1e4f64.powf(-62.0 / 64.0) - 1.0).abs() < 1e-3, "{got}");
    assert!((expected / 5e5f64.powf(-62.0 / 64.0) - 1.0).abs() < 1e-3, "{expected}");
    assert!((theta.unwrap() / 1e4 - 1.0).abs() < 1e-2, "{error}");
    assert!(bands.dims > 0, "{error}");
    assert!(error.to_string().contains("θ = 1.0000e4"), "{error}");
}

/// The scaling of Llama 3.1 changes slow pairs only, which stay slow.
#[test]
fn is_a_scaling_found_that_leaves_the_bands() {
    let error = probe(Rope::new(5e5), llama3_1()).unwrap_err();
    assert!(matches!(error, RopeMismatch::Frequency { theta: None, .. }), "{error}");
    assert_eq!(error.wrong_dims(), Some(0), "{error}");
    let error = probe(Rope::new(1e6), yarn()).unwrap_err();
    assert!(matches!(error, RopeMismatch::Frequency { .. }), "{error}");
}

#[test]
fn is_a_rotation_backwards_found() {
    let rope = Rope::new(1e4);
    // Rotating by −angle is rotating with the two dims of each pair exchanged.
    let backwards = |x: Tensor<4>, first| {
        let [a, b] = [0, 32].map(|from| x.clone().slice_dim(3, from..from + 32));
        let y = rotate(&rope, Tensor::cat(vec![b, a], 3), first);
        let [a, b] = [0, 32].map(|from| y.clone().slice_dim(3, from..from + 32));
        Tensor::cat(vec![b, a], 3)
    };
    let error = probe_config(&PrismConfig::new(rope), backwards).unwrap_err();
    let RopeMismatch::Frequency { got, expected, .. } = error else { panic!("{error}") };
    assert!((got + expected).abs() < 1e-3 * expected, "{got} and {expected}");
}

#[test]
fn is_the_attention_factor_compared() {
    let model = |factor| {
        let RopeScaling::Yarn { factor: f, beta_fast, beta_slow, original_max_positions, .. } =
            yarn().scaling
        else {
            unreachable!()
        };
        let scaling = RopeScaling::Yarn {
            factor: f,
            beta_fast,
            beta_slow,
            original_max_positions,
            attention_factor: Some(factor),
        };
        Rope { scaling, ..yarn() }
    };
    let error = probe(yarn(), model(1.0)).unwrap_err();
    let RopeMismatch::AttentionFactor { expected, got } = error else { panic!("{error}") };
    assert!((expected - 1.1386).abs() < 1e-3 && (got - 1.0).abs() < 1e-3, "{expected} {got}");
}

#[rstest]
#[case::partial(HEAD_DIM, 32)]
#[case::whole(32, HEAD_DIM)]
#[case::nothing(HEAD_DIM, 0)]
#[case::against_no_rope(0, HEAD_DIM)]
fn is_another_rotary_dim_found(#[case] config: usize, #[case] model: usize) {
    let rope = |dims| Rope { rotary_dim: Some(dims), ..Rope::new(1e4) };
    let error = probe(rope(config), rope(model)).unwrap_err();
    let RopeMismatch::RotaryDim { expected, got, bands } = error.clone() else { panic!("{error}") };
    assert_eq!((expected, got), (config, model));
    assert!(bands.dims > 0, "{error}");
}

#[test]
fn is_another_position_found() {
    let rope = Rope::new(5e5);
    let config = PrismConfig::new(rope);
    let ignores = probe_config(&config, |x, _| rotate(&rope, x, 0)).unwrap_err();
    assert_eq!(ignores, RopeMismatch::Position { asked: 61, got: Some(0) });
    let shifted = probe_config(&config, |x, first| rotate(&rope, x, first + 1)).unwrap_err();
    assert_eq!(shifted, RopeMismatch::Position { asked: 0, got: Some(1) });
    let far = probe_config(&config, |x, first| rotate(&rope, x, first + 5000)).unwrap_err();
    assert_eq!(far, RopeMismatch::Position { asked: 0, got: Some(5000) });
    assert_eq!(far.wrong_dims(), Some(0));
}

#[test]
fn are_other_pairs_found() {
    let rope = Rope::new(1e4);
    // Pairs from both ends: 0 with 63, 1 with 62.
    let mirrored = |x: Tensor<4>, first| {
        let flip = |x: Tensor<4>| {
            let [a, b] = [0, 32].map(|from| x.clone().slice_dim(3, from..from + 32));
            Tensor::cat(vec![a, b.flip([3])], 3)
        };
        flip(rotate(&rope, flip(x), first))
    };
    let error = probe_config(&PrismConfig::new(rope), mirrored).unwrap_err();
    assert!(matches!(error, RopeMismatch::Pairs { .. }), "{error}");
    assert!(error.to_string().contains("0 turns with 63, 1 with 62"), "{error}");
    // The last dims in place of the first.
    let trailing = |x: Tensor<4>, first| {
        let half = Rope { rotary_dim: Some(32), ..rope };
        rotate(&half, x.flip([3]), first).flip([3])
    };
    let error = probe_config(&PrismConfig::new(rope), trailing).unwrap_err();
    assert!(matches!(error, RopeMismatch::Pairs { .. }), "{error}");
}

#[rstest]
#[case::a_bias(&|x| x + 1.0, "isn't linear")]
#[case::a_norm(&|x: Tensor<4>| x.clone() / (x.clone() * x).sum_dim(3).sqrt(), "isn't linear")]
#[case::a_scale(&|x| x * 0.125, "scaled by")]
#[case::a_mixture(&|x: Tensor<4>| x.clone() + x.roll_dim(1, 3) * 0.5, "mixes with")]
#[case::not_a_number(&|x| x * f32::NAN, "isn't linear")]
#[case::zeros(&|x| x * 0.0, "scaled by 0")]
fn is_no_rotation_refused(#[case] model: &dyn Fn(Tensor<4>) -> Tensor<4>, #[case] says: &str) {
    let error = probe_config(&PrismConfig::new(Rope::new(1e4)), |x, _| model(x)).unwrap_err();
    assert!(matches!(error, RopeMismatch::NotARotation { .. }), "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

/// The first dim of each pair turned, the second left where it was: a slice assigned in vain.
#[test]
fn is_half_a_rotation_refused() {
    let rope = Rope::new(1e4);
    let half = |x: Tensor<4>, first| {
        let y = rotate(&rope, x.clone(), first);
        Tensor::cat(vec![y.slice_dim(3, 0..32), x.slice_dim(3, 32..64)], 3)
    };
    let error = probe_config(&PrismConfig::new(rope), half).unwrap_err();
    assert!(matches!(error, RopeMismatch::NotARotation { .. }), "{error}");
}

#[test]
fn are_bad_configs_and_shapes_refused() {
    let rope = Rope::new(1e4);
    let error = probe(Rope { rotary_dim: Some(65), ..rope }, rope).unwrap_err();
    assert!(matches!(error, RopeMismatch::Refused(PrismError::Rope { .. })), "{error}");
    let swapped = probe_config(&PrismConfig::new(rope), |x, _| x.swap_dims(1, 2)).unwrap_err();
    assert!(matches!(swapped, RopeMismatch::Refused(PrismError::Shape { .. })), "{swapped}");
}

/// One band of all dims is right whatever the layout: a head with two of its own isn't.
#[test]
fn bands_of_heads_count_where_they_are_the_worst() {
    let rope = Rope::new(1e4);
    let wrong = |config: &PrismConfig| {
        let rotation = |x, first| rotate(&interleaved(rope), x, first);
        probe_config(config, rotation).unwrap_err().wrong_dims()
    };
    let whole = PrismConfig::new(rope).with_bands(0, HEAD_DIM);
    assert_eq!(wrong(&whole), Some(0));
    let own = HeadOverride::new([3]).with_bands(HEAD_DIM / 2, HEAD_DIM / 2);
    assert_eq!(
        wrong(&whole.with_heads(own)),
        wrong(&PrismConfig::new(rope).with_bands(HEAD_DIM / 2, HEAD_DIM / 2))
    );
    assert!(wrong(&PrismConfig::new(rope).with_bands(HEAD_DIM / 2, HEAD_DIM / 2)) > Some(0));
    let streaming = SelectorConfig::Streaming(Default::default());
    assert_eq!(wrong(&PrismConfig::new(rope).with_selector(streaming)), Some(0));
}

#[test]
fn second_order_has_no_bands_to_be_wrong_about() {
    let rope = Rope::new(1e4);
    let config = PrismConfig::new(rope).with_scoring(Scoring::second_order());
    let error = probe_config(&config, |x, first| rotate(&interleaved(rope), x, first)).unwrap_err();
    assert_eq!(error.wrong_dims(), Some(0), "{error}");
}
