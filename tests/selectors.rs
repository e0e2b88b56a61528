//! Do the selectors choose on every device what they choose on the host, and do settings, caches,
//! plans and policies take any of them?

use burn::tensor::{DType, Device};
use burn_prism::plan::Kernel;
use burn_prism::{
    AttentionOptions, AttentionShape, BlockSelection, Budget, Calibration, HeadOverride,
    PrismConfig, Scoring, SelectionRule, SelectorConfig, Step, plan, prism_attention,
    select_blocks, select_blocks_by,
};
use rstest::rstest;
use tests::{all_devices, devices, has, values};

use super::selector_problem::{BLOCK, Problem, bare, of};

/// Options that fit some hundred tokens.
fn small() -> Vec<SelectorConfig> {
    vec![
        of("prism", &[("mass", "0.7"), ("high_dims", "8"), ("low_dims", "12")]),
        of("prism", &[("mass", "0.7"), ("pool_block", "16"), ("calibration", "causal")]),
        of("second_order", &[("mass", "0.7")]),
        of("outliers", &[("threshold", "0.1")]),
        of("mean_pool", &[("mass", "0.7")]),
        of("xattention", &[("stride", "4"), ("threshold", "0.7")]),
        of("xattention", &[("stride", "16"), ("threshold", "0.5")]),
        of("flexprefill", &[("min_budget", "32"), ("gamma", "0.6"), ("tau", "0")]),
        of("flexprefill", &[("min_budget", "16"), ("gamma", "0.6"), ("tau", "1")]),
        of(
            "flexprefill",
            &[("min_budget", "16"), ("gamma", "0.7"), ("tau", "0.2"), ("max_budget", "48")],
        ),
        of("flexprefill", &[]),
        of("minference", &[("adaptive", "0.2"), ("last_queries", "8")]),
        of("minference", &[("vertical", "35"), ("slash", "120")]),
        of("streaming", &[("sink", "16"), ("window", "40")]),
        of("streaming", &[("pattern", "tri_shape"), ("window", "17"), ("last", "20")]),
        of("dilated", &[("segments", "64,128"), ("strides", "1,2")]),
        of("dilated", &[("segments", "32,96"), ("strides", "2,3")]),
        of("lsh", &[("buckets", "8"), ("rounds", "2")]),
        of("top_k", &[("blocks", "3")]),
        of("oracle", &[("mass", "0.7")]),
    ]
}

/// Whole prompts, chunks, more queries than keys, sequences of several lengths.
#[rstest]
#[case::whole(&[(200, 200)])]
#[case::aligned(&[(240, 240), (240, 240)])]
#[case::chunk(&[(70, 203)])]
#[case::blind(&[(210, 200)])]
#[case::ragged(&[(200, 200), (37, 37), (0, 0), (5, 170)])]
fn devices_choose_what_the_host_chooses(#[case] lengths: &[(usize, usize)]) {
    let problem = Problem::new(lengths, DType::F32, 71);
    for device in devices() {
        for selector in small() {
            problem.check(&selector, &bare(), DType::F32, &device);
        }
    }
}

/// Several sub-blocks a block, some keys that stand out, scores that scatter more than their number
/// bears.
fn with_outliers(mut problem: Problem, dtype: DType) -> Problem {
    problem.block = 64;
    let d = problem.inputs.shape.head_dim;
    let inputs = &mut problem.inputs;
    inputs.k.chunks_mut(d).step_by(37).for_each(|k| k.fill(0.02));
    inputs.k.chunks_mut(d).skip(90).take(60).for_each(|k| k[3] *= 9.0);
    inputs.q.chunks_mut(d).skip(150).step_by(2).for_each(|q| q[3] += 3.0);
    if dtype == DType::BF16 {
        let round = |x: &mut f32| *x = half::bf16::from_f32(*x).to_f32();
        inputs.k.iter_mut().chain(&mut inputs.q).for_each(round);
    }
    problem
}

#[rstest]
#[case::whole(&[(400, 400)])]
#[case::chunk(&[(137, 395)])]
#[case::ragged(&[(300, 300), (61, 61), (5, 290)])]
fn outliers_are_found_on_devices(#[case] lengths: &[(usize, usize)]) {
    let problem = with_outliers(Problem::new(lengths, DType::F32, 103), DType::F32);
    let config = bare().with_block(64);
    for device in devices() {
        for subs in [("16", "16"), ("32", "16"), ("16", "64")] {
            let settings = [("threshold", "0.05"), ("query_sub", subs.0), ("key_sub", subs.1)];
            problem.check(&of("outliers", &settings), &config, DType::F32, &device);
        }
    }
}

/// The kernels: groups of one and of three, heads of models' widths, odd lengths and offsets; limits, which
/// are left to tensor ops.
#[rstest]
#[case::alone([2, 2, 128], &[(333, 333)])]
#[case::chunk([3, 1, 64], &[(137, 395)])]
#[case::ragged([3, 1, 64], &[(211, 300), (61, 61), (0, 0), (5, 290)])]
fn kernels_find_outliers(#[case] heads: [usize; 3], #[case] lengths: &[(usize, usize)]) {
    for dtype in [DType::F32, DType::BF16] {
        let problem = with_outliers(Problem::with_heads(heads, lengths, dtype, 109), dtype);
        let config = PrismConfig { scale: Some(0.2), ..bare().with_block(64) };
        let mut forced = config.clone();
        forced.selection = SelectionRule { dense_last_blocks: 1, ..SelectionRule::default() };
        let mut limited = config.clone();
        limited.selection = SelectionRule { min_blocks: 3, ..config.selection };
        for device in all_devices().into_iter().filter(|device| has(device, dtype)) {
            for (subs, config) in [("16", &config), ("32", &forced), ("32", &limited)] {
                let settings = [("threshold", "0.05"), ("query_sub", subs), ("key_sub", subs)];
                problem.check(&of("outliers", &settings), config, dtype, &device);
            }
        }
    }
}

/// A plan says whether kernels select.
#[test]
fn plans_say_where_outliers_are_found() {
    let kv = [1, 2, 8192, 64];
    let shape = AttentionShape::new([1, 4, 8192, 64], kv, kv).unwrap();
    for device in all_devices() {
        let selects_by = |selection: SelectionRule| {
            let config = PrismConfig { selection, ..PrismConfig::llama3() }.with_dense_below(0);
            let config = config.with_selector(of("outliers", &[]));
            let plan = plan(&config, &shape, None, DType::F32, &device).unwrap();
            (plan.selects_by.unwrap(), plan.kernel, plan.bytes)
        };
        let (selects_by_default, kernel, bytes) = selects_by(SelectionRule::default());
        let limits = SelectionRule { max_blocks: Some(9), ..SelectionRule::default() };
        let (selects_by_limits, _, more_bytes) = selects_by(limits);
        assert_eq!(selects_by_limits, Kernel::TensorOps);
        if [Kernel::CubeUnit, Kernel::CubePlane, Kernel::CubeMma, Kernel::CubeHopper]
            .contains(&kernel)
        {
            assert_eq!(selects_by_default, kernel);
            assert!(bytes < more_bytes);
        } else {
            assert_eq!(selects_by_default, Kernel::TensorOps);
        }
    }
}

/// Of little work, so that every runtime can take part.
#[test]
fn every_runtime_chooses_what_the_host_chooses() {
    let problem = Problem::new(&[(70, 150)], DType::F32, 73);
    // One of each method.
    let all = small();
    let some: Vec<_> = SelectorConfig::names()
        .map(|name| all.iter().find(|one| one.name() == name).expect(name))
        .into();
    for device in all_devices() {
        for &selector in &some {
            problem.check(selector, &bare(), DType::F32, &device);
        }
    }
}

#[test]
fn forced_blocks_limits_and_scale_act_on_devices() {
    let problem = Problem::new(&[(200, 200)], DType::F32, 79);
    let mut forced = bare();
    forced.selection.sink_blocks = 1;
    forced.selection.recent_blocks = 2;
    forced.selection.dense_last_blocks = 1;
    let mut limited = forced.clone();
    limited.selection.min_blocks = 5;
    limited.selection.max_blocks = Some(6);
    // Prism and second order know no other scale.
    let scaled = PrismConfig { scale: Some(0.6), ..forced.clone() };
    for device in devices() {
        for selector in small() {
            problem.check(&selector, &forced, DType::F32, &device);
            problem.check(&selector, &limited, DType::F32, &device);
            problem.check(&selector, &scaled, DType::F32, &device);
        }
    }
}

#[test]
fn half_precision_inputs_are_scored_in_f32() {
    for dtype in [DType::F16, DType::BF16] {
        let problem = Problem::new(&[(150, 150)], dtype, 83);
        for selector in small() {
            problem.check(&selector, &bare(), dtype, &Device::flex());
        }
    }
}

/// On tensor cores these are kernels: groups of one and of three, widths of models, odd lengths and offsets.
#[rstest]
#[case::alone([2, 2, 128], &[(333, 333)])]
#[case::chunk([3, 1, 64], &[(137, 395)])]
#[case::ragged([3, 1, 64], &[(211, 300), (61, 61), (0, 0), (5, 290)])]
fn antidiagonals_in_half_precision(#[case] heads: [usize; 3], #[case] lengths: &[(usize, usize)]) {
    for dtype in [DType::F16, DType::BF16] {
        let problem = Problem { block: 64, ..Problem::with_heads(heads, lengths, dtype, 113) };
        let config = PrismConfig { scale: Some(0.2), ..bare().with_block(64) };
        let mut forced = config.clone();
        forced.selection = SelectionRule { dense_last_blocks: 1, ..SelectionRule::default() };
        for device in all_devices().into_iter().filter(|device| has(device, dtype)) {
            for (stride, config) in [("8", &config), ("16", &forced)] {
                let settings = [("stride", stride), ("threshold", "0.7")];
                problem.check(&of("xattention", &settings), config, dtype, &device);
            }
        }
    }
}

/// A plan says whether kernels sum along antidiagonals: on tensor cores, for half precision.
#[test]
fn plans_say_where_antidiagonals_are_summed() {
    let kv = [1, 2, 8192, 64];
    let shape = AttentionShape::new([1, 4, 8192, 64], kv, kv).unwrap();
    for device in all_devices() {
        let selects_by = |dtype, selector| {
            let config = PrismConfig::llama3().with_dense_below(0).with_selector(selector);
            let plan = plan(&config, &shape, None, dtype, &device).unwrap();
            (plan.selects_by.unwrap(), plan.kernel)
        };
        let all = selects_by(DType::F32, of("xattention", &[]));
        assert_eq!(all.0, Kernel::TensorOps, "{device:?}");
        if !has(&device, DType::BF16) {
            continue;
        }
        let (by, attention) = selects_by(DType::BF16, of("xattention", &[]));
        if matches!(attention, Kernel::CubeHopper) {
            assert_eq!(by, attention, "{device:?}");
        } else if !matches!(attention, Kernel::CubeMma) {
            assert_eq!(by, Kernel::TensorOps, "{device:?}");
        }
        assert_eq!(selects_by(DType::BF16, of("oracle", &[])).0, Kernel::TensorOps, "{device:?}");
    }
}

/// More than one go holds on the way: 4 · 1500 · 1500 elements are two and more.
#[test]
fn runs_of_rows_make_one_selection() {
    let problem = Problem::new(&[(1500, 1500)], DType::F32, 89);
    for selector in [
        of("oracle", &[("mass", "0.7")]),
        of("xattention", &[("stride", "4"), ("threshold", "0.7")]),
    ] {
        problem.check(&selector, &bare(), DType::F32, &Device::flex());
    }
}

/// Likewise with the masses themselves: 4 · 1063 · 1063 of them are two goes.
#[test]
fn runs_of_blocks_make_one_selection() {
    let problem = Problem::new(&[(17_000, 17_000)], DType::F32, 93);
    let selector = of("xattention", &[("stride", "16"), ("threshold", "0.7")]);
    problem.check(&selector, &bare(), DType::F32, &Device::flex());
}

/// Likewise with the last queries: 2 · 4500 · 4500 probabilities of a kv head are three goes.
#[test]
fn runs_of_heads_and_of_last_queries_make_one_selection() {
    let problem = Problem::new(&[(4500, 4500)], DType::F32, 91);
    let last = [("vertical", "60"), ("slash", "300"), ("last_queries", "4500")];
    problem.check(&of("minference", &last), &bare(), DType::F32, &Device::flex());
}

/// NaN and infinities end, in range, and stay with their heads.
#[test]
fn bad_numbers_terminate_on_devices() {
    for device in devices() {
        let mut problem = Problem::new(&[(130, 130)], DType::F32, 97);
        let good: Vec<_> = small().iter().map(|one| chosen(&problem, one, &device)).collect();
        let (k, q) = (&mut problem.inputs.k, &mut problem.inputs.q);
        // Of the first kv head, and of the first of its two query heads.
        k[16 * 40..16 * 41].fill(f32::NAN);
        k[16 * 60] = f32::INFINITY;
        q[16 * 128] = f32::NAN;
        for (selector, good) in small().iter().zip(good) {
            let got = chosen(&problem, selector, &device);
            got.validate(&problem.grids(), 4).unwrap();
            for (h, row) in [2, 3].into_iter().flat_map(|h| (0..9).map(move |row| (h, row))) {
                assert_eq!(
                    got.row_words(0, h, row),
                    good.row_words(0, h, row),
                    "{device:?} {selector}: row {row} of head {h}"
                );
            }
        }
    }
}

fn chosen(problem: &Problem, selector: &SelectorConfig, device: &Device) -> BlockSelection {
    let [q, k, _] = problem.inputs.tensors(DType::F32, device);
    let selected = select_blocks_by(q, k, selector, &bare(), &problem.options()).unwrap();
    selected.to_host().unwrap()
}

/// A call with a selector, a cached call and a selection by itself agree.
#[test]
fn attention_and_caches_take_any_selector() {
    let problem = Problem::new(&[(200, 200)], DType::F32, 101);
    let device = Device::flex();
    let [q, k, v] = problem.inputs.tensors(DType::F32, &device);
    let options = AttentionOptions::default();
    for selector in small() {
        let config = bare().with_selector(selector.clone());
        let whole = prism_attention(q.clone(), k.clone(), v.clone(), &config, &options).unwrap();
        let selected = whole.report.selected.unwrap().to_host().unwrap();
        let alone = select_blocks(q.clone(), k.clone(), &config, &options).unwrap();
        assert!(selected == alone.to_host().unwrap(), "{selector}");

        let shape = problem.inputs.shape;
        let mut cache =
            burn_prism::PrismCache::new(&shape, 200, BLOCK, DType::F32, &device).unwrap();
        let cached = config.init();
        let cached = cached.forward_cached(q.clone(), k.clone(), v.clone(), &mut cache, &options);
        let cached = cached.unwrap();
        assert!(selected == cached.report.selected.unwrap().to_host().unwrap(), "{selector}");
        assert_eq!(values(whole.output), values(cached.output), "{selector}");
    }
}

/// Chunks that end with blocks choose what the whole prompt does, by methods that don't look at the
/// prompt's last queries.
#[test]
fn aligned_chunks_choose_what_the_whole_prompt_does() {
    let problem = Problem::new(&[(192, 192)], DType::F32, 103);
    let device = Device::flex();
    let [q, k, v] = problem.inputs.tensors(DType::F32, &device);
    let shape = problem.inputs.shape;
    for selector in small() {
        if ["prism", "flexprefill", "minference"].contains(&selector.name())
            || selector.to_string().contains("tri_shape")
        {
            continue;
        }
        let config = bare().with_selector(selector.clone());
        let options = AttentionOptions::default();
        let whole = select_blocks(q.clone(), k.clone(), &config, &options).unwrap();
        let whole = whole.to_host().unwrap();
        let mut cache =
            burn_prism::PrismCache::new(&shape, 192, BLOCK, DType::F32, &device).unwrap();
        for (start, end) in [(0, 80), (80, 192)] {
            let part = |x: &burn::tensor::Tensor<4>| x.clone().slice_dim(2, start..end);
            let options = AttentionOptions::default().with_more_follows(end < 192);
            let output = config
                .init()
                .forward_cached(part(&q), part(&k), part(&v), &mut cache, &options)
                .unwrap();
            let chunk = output.report.selected.unwrap().to_host().unwrap();
            for (h, row) in (0..4).flat_map(|h| (start / BLOCK..end / BLOCK).map(move |r| (h, r))) {
                let got: Vec<usize> = chunk.blocks(0, h, row - start / BLOCK).collect();
                assert_eq!(
                    got,
                    whole.blocks(0, h, row).collect::<Vec<_>>(),
                    "{selector}: {h} {row}"
                );
            }
        }
    }
}

#[test]
fn heads_have_masses_and_limits_of_their_own() {
    let problem = Problem::new(&[(200, 200)], DType::F32, 107);
    let [q, k, _] = problem.inputs.tensors(DType::F32, &Device::flex());
    let options = AttentionOptions::default();
    let select = |config: &PrismConfig| {
        select_blocks(q.clone(), k.clone(), config, &options).unwrap().to_host().unwrap()
    };
    for name in ["mean_pool", "oracle"] {
        let config = bare().with_mass(0.6).with_selector(of(name, &[]));
        let (some, all) = (select(&config), select(&config.clone().with_mass(0.9)));
        let mixed = config.with_heads(HeadOverride::new([1, 2]).with_mass(0.9));
        let mixed = select(&mixed);
        for (h, row) in (0..4).flat_map(|h| (0..13).map(move |row| (h, row))) {
            let expected = if h == 1 || h == 2 { &all } else { &some };
            assert_eq!(mixed.row_words(0, h, row), expected.row_words(0, h, row), "{name} {h}");
        }
    }
    let config = bare().with_selector(of("xattention", &[]));
    let limited = config.clone().with_heads(HeadOverride::new([3]).with_max_blocks(2));
    assert!((0..13).all(|row| select(&limited).count(0, 3, row) <= 2));
    let error = config.with_heads(HeadOverride::new([3]).with_mass(0.5)).validate_for(4, 16);
    assert_eq!(
        error.unwrap_err().to_string(),
        "selector: xattention has a budget of its own, but heads have a mass"
    );
}

#[test]
fn prism_s_own_methods_become_its_settings() {
    let config = bare().with_selector(of("second_order", &[("key_sub", "16"), ("mass", "0.8")]));
    assert_eq!(config.scoring, Scoring::SecondOrder { query_sub: 16, key_sub: 16 });
    assert_eq!(config.selection.budget, Budget::Mass(0.8));
    let settings = [("high_dims", "8"), ("low_dims", "12"), ("calibration", "causal")];
    let config = config.with_selector(of("prism", &settings));
    assert_eq!(config.scoring, Scoring::Bands);
    assert_eq!(config.calibration, Calibration::Causal);
    assert_eq!(config.bands, burn_prism::BandRule::Dims { high: 8, low: 12 });
    assert_eq!(config.selector, None);
    let config = config.with_selector(of("lsh", &[]));
    assert_eq!((config.bands, config.calibration), Default::default());
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<PrismConfig>(&json).unwrap(), config);
}

#[test]
fn settings_that_contradict_a_selector_are_refused() {
    let refuse = |config: PrismConfig, says: &str| {
        let error = config.validate_for(4, 16).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let xattention = || bare().with_selector(of("xattention", &[]));
    refuse(
        xattention().with_calibration(Calibration::Off),
        "beside xattention no scoring, bands or",
    );
    refuse(xattention().with_bands(8, 8), "beside xattention no scoring, bands or calibration");
    refuse(
        xattention().with_scoring(Scoring::SecondOrder { query_sub: 16, key_sub: 16 }),
        "beside xattention no scoring",
    );
    refuse(xattention().with_block(20), "block must be a multiple of 8, got 20");
    refuse(bare().with_block(20).with_selector(of("dilated", &[])), "segment must be a multiple");
    let mut prism = bare();
    prism.selector = Some(of("prism", &[]));
    refuse(prism, "prism is set by scoring, bands and calibration");
    let mut bad = bare();
    bad.selector = Some(SelectorConfig::TopK(prism_core::selectors::TopK { blocks: 0 }));
    refuse(bad, "blocks must be at least 1, got 0");
}

/// A plan says which method chooses and what computes it, before anything runs.
#[test]
fn plans_name_the_method_and_what_computes_it() {
    let kv = [1, 2, 4096, 64];
    let shape = AttentionShape::new([1, 4, 4096, 64], kv, kv).unwrap();
    let plan =
        |config: &PrismConfig| plan(config, &shape, None, DType::F32, &Device::flex()).unwrap();
    let of_name = |name| plan(&PrismConfig::llama3().with_selector(of(name, &[])));
    let prism = plan(&PrismConfig::llama3());
    assert_eq!((prism.selector, prism.selects_by), (Some("prism"), Some(Kernel::Flex)));
    let pooled = of_name("mean_pool");
    assert_eq!((pooled.selector, pooled.selects_by), (Some("mean_pool"), Some(Kernel::Flex)));
    assert_eq!(pooled.steps, [Step::Pool, Step::Select, Step::Attend]);
    let other = of_name("xattention");
    assert_eq!((other.selector, other.selects_by), (Some("xattention"), Some(Kernel::TensorOps)));
    assert_eq!(other.steps, [Step::Select, Step::Attend]);
    assert!(other.bytes > prism.bytes);
    let dense = plan(&PrismConfig::llama3().with_dense_below(9999));
    assert_eq!((dense.selector, dense.selects_by), (None, None));
}

mod policies {
    use prism_models::{AttentionPolicy, Checkpoint, Llama};

    use super::*;

    fn parse(json: &str) -> AttentionPolicy {
        serde_json::from_str(json).unwrap()
    }

    fn llama() -> Llama {
        let checkpoint = Checkpoint::open(tests::fixtures().join("models/tiny-llama31")).unwrap();
        Llama::load(&checkpoint, DType::F32, &Device::flex(), &mut |_, _| {}).unwrap()
    }

    #[test]
    fn layers_have_methods_of_their_own() {
        let mut llama = llama();
        let policy = parse(
            r#"{
                "block": 16,
                "base": {"selector": {"mean_pool": {}}, "mass": 0.5, "dense_below": 0},
                "layers": [
                    {"first": 1, "last": 1, "set": {"selector": {"top_k": {"blocks": 2}}, "dense_last_blocks": 0}},
                    {"first": 2, "last": 2, "set": {"scoring": "bands"}}
                ]
            }"#,
        );
        let configs: Vec<_> = policy.resolve(llama.config()).unwrap();
        let names: Vec<_> = configs
            .iter()
            .map(|config| config.as_ref().unwrap().selector.as_ref().map(SelectorConfig::name))
            .collect();
        assert_eq!(names, [Some("mean_pool"), Some("top_k"), None]);
        llama.set_policy(&policy).unwrap();
        let ids: Vec<u32> = (0..300).map(|i| i * i % 511).collect();
        let (mut cache, mut traces) = (llama.cache(ids.len(), 16).unwrap(), Vec::new());
        let options = AttentionOptions::default();
        let trace: &mut dyn FnMut(_) = &mut |trace| traces.push(trace);
        llama.hidden(&ids, &mut cache, &options, Some(trace)).unwrap();
        let selected = traces[1].report.selected.as_ref().unwrap().to_host().unwrap();
        // Two blocks, and the first and the diagonal.
        assert!(selected.counts().iter().all(|&count| count <= 4));
    }

    #[test]
    fn settings_of_other_methods_are_refused() {
        let llama = llama();
        let refuse = |json: &str, says: &str| {
            let error = parse(json).resolve(llama.config()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        refuse(
            r#"{"base": {"selector": {"xattention": {}}, "mass": 0.9}}"#,
            "base: mass is no setting of the selector xattention (stride=8, threshold=0.9)",
        );
        refuse(
            r#"{"base": {"selector": {"mean_pool": {}}, "calibration": "off"}}"#,
            "base: calibration is no setting of the selector mean_pool",
        );
        refuse(
            r#"{"base": {"selector": {"lsh": {}}}, "layers": [{"first": 0, "last": 0, "set": {"mass": 0.5}}]}"#,
            "layer 0: mass is no setting of the selector lsh",
        );
        refuse(
            r#"{"base": {"selector": {"top_k": {"blocks": 0}}}}"#,
            "base: blocks must be at least 1, got 0",
        );
    }
}
