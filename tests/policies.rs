//! Do the layers of a model attend as its policy says, and are policies refused that say nothing, say
//! two things, or speak of layers and heads that the model lacks?

use burn::tensor::{DType, Device};
use burn_prism::{
    AttentionOptions, BandRule, Budget, Calibration, HeadOverride, PrismConfig, Scoring,
};
use prism_models::{
    AttentionPolicy, Checkpoint, LayerOverride, LayerSettings, LayerTrace, Llama, ModelConfig,
    PolicyError, presets,
};
use rstest::rstest;
use tests::{fixtures, values};

/// Three layers of four query heads.
fn llama(name: &str) -> Llama {
    let checkpoint = Checkpoint::open(fixtures().join("models").join(name)).unwrap();
    Llama::load(&checkpoint, DType::F32, &Device::flex(), &mut |_, _| {}).unwrap()
}

fn tiny() -> ModelConfig {
    Checkpoint::open(fixtures().join("models/tiny-llama31")).unwrap().config().clone()
}

fn parse(json: &str) -> AttentionPolicy {
    serde_json::from_str(json).unwrap()
}

const POLICY: &str = r#"{
    "block": 16,
    "base": {"mass": 0.6, "bands": {"dims": {"high": 16, "low": 24}}, "dense_below": 0},
    "layers": [
        {"first": 0, "last": 0, "dense": true},
        {"first": 2, "last": 2, "set": {"heads": [
            {"heads": [1, 3], "mass": 1.0},
            {"heads": [0], "bands": {"dims": {"high": 0, "low": 24}}}
        ]}},
        {"first": 1, "last": 2, "set": {"dense_last_blocks": 0, "calibration": "causal"}}
    ]
}"#;

fn run(llama: &Llama) -> (Vec<f32>, Vec<LayerTrace>) {
    let ids: Vec<u32> = (0..300).map(|i| i * i % 511).collect();
    let (mut cache, mut traces) = (llama.cache(ids.len(), 16).unwrap(), Vec::new());
    let options = AttentionOptions::default();
    let hidden =
        llama.hidden(&ids, &mut cache, &options, Some(&mut |trace| traces.push(trace))).unwrap();
    (values(hidden), traces)
}

#[test]
fn a_policy_reaches_the_layers_and_heads_that_it_names() {
    let mut llama = llama("tiny-llama31");
    llama.set_policy(&parse(POLICY)).unwrap();
    let (got, traces) = run(&llama);
    let paths: Vec<_> = traces.iter().map(|trace| trace.report.path.to_string()).collect();
    assert_eq!(paths, ["dense", "sparse", "sparse"]);
    let by_head: Vec<_> = traces[1..]
        .iter()
        .map(|trace| trace.report.selected.as_ref().unwrap().density_by_head().unwrap())
        .collect();
    assert!(by_head[0].iter().all(|&density| density < 0.95), "{by_head:?}");
    assert!(by_head[1][0] < 0.95 && by_head[1][2] < 0.95, "{by_head:?}");
    assert_eq!([by_head[1][1], by_head[1][3]], [1.0; 2]);

    // The same, set by hand.
    let base = PrismConfig::new(llama.config().rope).with_block(16).with_mass(0.6);
    let base = base.with_bands(16, 24).with_dense_below(0);
    let other = base.with_dense_last_blocks(0).with_calibration(Calibration::Causal);
    llama.set_attention(None).unwrap();
    llama.set_layer_attention(1, Some(&other)).unwrap();
    let other = other.with_heads(HeadOverride::new([1, 3]).with_mass(1.0));
    let other = other.with_heads(HeadOverride::new([0]).with_bands(0, 24));
    llama.set_layer_attention(2, Some(&other)).unwrap();
    assert_eq!(got, run(&llama).0);

    // A head past the last changes nothing, neither by a policy nor by hand.
    let past = HeadOverride::new([4]).with_mass(0.5);
    let mut policy = parse(POLICY);
    policy.base.heads = Some(vec![past.clone()]);
    let error = llama.set_policy(&policy).unwrap_err().to_string();
    assert_eq!(error, "policy: base: head overrides: there is no query head 4: there are 4");
    assert!(llama.set_layer_attention(1, Some(&other.with_heads(past))).is_err());
    assert_eq!(got, run(&llama).0);
}

#[test]
fn an_empty_policy_is_what_is_recommended() {
    for name in ["tiny-llama31", "tiny-qwen2", "tiny-qwen3-yarn"] {
        let mut llama = llama(name);
        let config = llama.prism_config();
        let resolved = parse("{}").resolve(llama.config()).unwrap();
        assert_eq!(resolved, vec![Some(config.clone()); 3], "{name}");
        llama.set_policy(&AttentionPolicy::default()).unwrap();
        let mass = if name.contains("qwen") { 0.93 } else { 0.95 };
        assert_eq!(config.selection.budget, Budget::Mass(mass), "{name}");
        assert_eq!(config, PrismConfig::new(llama.config().rope).with_mass(mass), "{name}");
    }
}

/// The presets that need no checkpoint are those of the family.
#[test]
fn presets_agree_with_the_published_settings() {
    let of = |model_type: &str, class: &str, theta: f64| {
        let json = format!(
            r#"{{"architectures": ["{class}"], "model_type": "{model_type}", "head_dim": 128,
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 40960, "rope_theta": {theta},
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "mlp_bias": false,
            "sliding_window": null, "use_sliding_window": false}}"#
        );
        presets::recommended(&ModelConfig::from_hugging_face(json.as_bytes()).unwrap())
    };
    let llama = of("llama", "LlamaForCausalLM", 5e5);
    assert_eq!(llama, PrismConfig::llama3());
    assert_eq!(of("qwen3", "Qwen3ForCausalLM", 1e6), PrismConfig::qwen3());
    assert_eq!(of("qwen2", "Qwen2ForCausalLM", 1e6), PrismConfig::qwen2());
    let published = |source: &str| {
        let all: Vec<_> = presets::PUBLISHED.iter().filter(|p| p.source == source).collect();
        all.iter().map(|one| Budget::Mass(one.mass)).collect::<Vec<_>>()
    };
    let qwen = PrismConfig::qwen3();
    assert_eq!(published("paper, §4.1"), [llama.selection.budget, qwen.selection.budget]);
    // Published: 64 high and 96 low dims in blocks of 128.
    for config in [llama, qwen] {
        let bands = config.validate(128).unwrap();
        assert_eq!((config.block, bands.high().len(), bands.low().len()), (128, 64, 96));
    }
}

#[test]
fn policies_survive_json() {
    let all = LayerSettings {
        selector: None,
        mass: Some(0.9),
        scoring: Some(Scoring::Bands),
        bands: Some(BandRule::Dims { high: 16, low: 24 }),
        calibration: Some(Calibration::Causal),
        sink_blocks: Some(2),
        recent_blocks: Some(3),
        dense_last_blocks: Some(4),
        min_blocks: Some(5),
        max_blocks: Some(6),
        dense_below: Some(7),
        heads: Some(vec![HeadOverride::new([1]).with_mass(0.5).with_min_blocks(4)]),
    };
    let layers = vec![
        LayerOverride { first: 0, last: 0, dense: true, set: LayerSettings::default() },
        LayerOverride { first: 1, last: 2, dense: false, set: all.clone() },
    ];
    let policy = AttentionPolicy { block: Some(64), base: all, layers };
    let json = serde_json::to_string(&policy).unwrap();
    assert_eq!(parse(&json), policy);
    assert_eq!(
        serde_json::to_string(&AttentionPolicy::default()).unwrap(),
        r#"{"base":{},"layers":[]}"#
    );

    // Every setting acts.
    let resolved = policy.resolve(&tiny()).unwrap();
    let mut right = PrismConfig::new(tiny().rope).with_mass(0.9).with_block(64).with_bands(16, 24);
    right = right.with_calibration(Calibration::Causal).with_dense_below(7);
    right = right.with_dense_last_blocks(4);
    (right.selection.sink_blocks, right.selection.recent_blocks) = (2, 3);
    (right.selection.min_blocks, right.selection.max_blocks) = (5, Some(6));
    right = right.with_heads(HeadOverride::new([1]).with_mass(0.5).with_min_blocks(4));
    assert_eq!(resolved, [None, Some(right.clone()), Some(right)]);
    let second_order =
        parse(r#"{"base": {"scoring": {"second_order": {"query_sub": 32, "key_sub": 16}}}}"#);
    let resolved = second_order.resolve(&tiny()).unwrap();
    assert_eq!(resolved[1].as_ref().unwrap().scoring, Scoring::second_order());
}

#[rstest]
#[case(r#"{"layer": []}"#, "unknown field `layer`")]
#[case(r#"{"rope": {"theta": 1e4}}"#, "unknown field `rope`")]
#[case(r#"{"base": {"block": 64}}"#, "unknown field `block`")]
#[case(r#"{"layers": [{"first": 0, "last": 1, "mass": 0.9}]}"#, "unknown field `mass`")]
#[case(r#"{"layers": [{"first": 0, "dense": true}]}"#, "missing field `last`")]
#[case(r#"{"layers": [{"first": -1, "last": 0, "dense": true}]}"#, "invalid value: integer `-1`")]
#[case(r#"{"base": {"heads": [{"heads": [0], "scoring": "bands"}]}}"#, "unknown field `scoring`")]
#[case("mass = 0.9", "expected value")]
#[case("", "EOF")]
fn texts_that_are_no_policy_are_refused(#[case] json: &str, #[case] says: &str) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.json");
    std::fs::write(&file, format!("{json} ")).unwrap();
    let error = AttentionPolicy::open(&file).unwrap_err();
    assert!(matches!(error, PolicyError::Json(_)), "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn files_that_hold_no_policy_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_path_buf(), folder.path().join("nothing.json")] {
        assert!(matches!(AttentionPolicy::open(&path), Err(PolicyError::File(_))));
    }
    let large = folder.path().join("large.json");
    std::fs::write(&large, format!("{{}}{}", " ".repeat(1 << 20))).unwrap();
    let error = AttentionPolicy::open(&large).unwrap_err().to_string();
    assert!(error.contains("1048576") && error.contains("1048578"), "{error}");
}

#[rstest]
#[case(
    r#"{"layers": [{"first": 1, "last": 3, "dense": true}]}"#,
    "override 0: there is no layer 3: the model has 3"
)]
#[case(
    r#"{"layers": [{"first": 2, "last": 1, "dense": true}]}"#,
    "override 0: the last layer must be at least the first, 2, got 1"
)]
#[case(r#"{"layers": [{"first": 0, "last": 1}]}"#, "override 0, of layers 0 to 1, sets nothing")]
#[case(
    r#"{"layers": [{"first": 0, "last": 1, "set": {"mass": 0.9}},
                   {"first": 1, "last": 2, "set": {"max_blocks": 9, "mass": 0.8}}]}"#,
    "layer 1: mass of override 1 contradicts mass of override 0"
)]
#[case(
    r#"{"layers": [{"first": 2, "last": 2, "dense": true},
                   {"first": 0, "last": 2, "set": {"sink_blocks": 2}}]}"#,
    "layer 2: sink_blocks of override 1 contradicts dense of override 0"
)]
#[case(
    r#"{"layers": [{"first": 0, "last": 0, "dense": true, "set": {"mass": 0.9}}]}"#,
    "layer 0: mass of override 0 contradicts dense of override 0"
)]
#[case(
    r#"{"layers": [{"first": 0, "last": 0, "dense": true}, {"first": 0, "last": 0, "dense": true}]}"#,
    "layer 0: dense of override 1 contradicts dense of override 0"
)]
#[case(r#"{"base": {"mass": 95}}"#, "base: mass must be above 0 and at most 1, got 95")]
#[case(r#"{"block": 0}"#, "base: block size must be between 1 and")]
#[case(
    r#"{"layers": [{"first": 1, "last": 1, "set": {"bands": {"dims": {"high": 3, "low": 24}}}}]}"#,
    "layer 1: bands: high_dims must be even"
)]
#[case(
    r#"{"base": {"min_blocks": 8}, "layers": [{"first": 2, "last": 2, "set": {"max_blocks": 4}}]}"#,
    "layer 2: min_blocks must be at most max_blocks, got 8"
)]
#[case(
    r#"{"layers": [{"first": 1, "last": 1, "set": {"heads": [{"heads": [4], "mass": 1.0}]}}]}"#,
    "layer 1: head overrides: there is no query head 4: there are 4"
)]
#[case(
    r#"{"base": {"calibration": "off", "scoring": {"second_order": {"query_sub": 32, "key_sub": 16}}}}"#,
    "base: calibration is for scoring by bands"
)]
fn policies_that_do_not_fit_are_refused(#[case] json: &str, #[case] says: &str) {
    let error = parse(json).resolve(&tiny()).unwrap_err().to_string();
    assert!(error.starts_with(says), "{error}");
}
