//! Does the program say what it does and refuse what it can't? Help texts are golden:
//! `cargo xtask bless` rewrites them.

mod support;

use std::path::Path;

use support::{prism, tiny_model};

const COMMANDS: [&str; 21] = [
    "",
    "run",
    "chat",
    "ppl",
    "compare",
    "plan",
    "doctor",
    "bench",
    "bench attention",
    "bench matmul",
    "bench prefill",
    "bench selectors",
    "eval",
    "eval perplexity",
    "eval needle",
    "eval ruler",
    "eval longbench",
    "eval infinitebench",
    "eval recall",
    "eval spectrum",
    "eval ablate",
];

#[test]
fn bless_help_is_golden() {
    for command in COMMANDS {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let (ok, help, _) = prism(&args);
        assert!(ok);
        let name = if command.is_empty() { "prism".into() } else { command.replace(' ', "-") };
        let golden =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help").join(format!("{name}.txt"));
        if std::env::var_os("PRISM_BLESS").is_some() {
            std::fs::write(&golden, &help).unwrap();
        }
        let right = std::fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(help, right, "run `cargo xtask bless` and read the difference");
    }
}

#[test]
fn doctor_says_what_can_run_and_why_not_the_rest() {
    let (ok, text, _) = prism(&["doctor"]);
    assert!(ok && text.contains("flex") && text.contains("cuda: "), "{text}");
    let (ok, json, _) = prism(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(ok && json["threads"].as_u64().unwrap() >= 1);
    assert_eq!(json["devices"][0]["name"], "flex");
}

#[test]
fn plan_answers_without_running() {
    let (ok, json, _) = prism(&["plan", "--tokens", "131072", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(ok);
    assert_eq!(json["path"], "sparse");
    assert_eq!((json["high_dims"].as_u64(), json["low_dims"].as_u64()), (Some(64), Some(96)));
    let bands = |args: &[&str]| {
        let (ok, json, error) = prism(&[&["plan", "--json", "--selector"], args].concat());
        assert!(ok, "{error}");
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        (json["high_dims"].as_u64(), json["low_dims"].as_u64())
    };
    let parts =
        ["prism", "--set", "pool_block=16", "--set", "high_dims=16", "--set", "low_dims=48"];
    assert_eq!(bands(&parts), (Some(16), Some(48)));
    assert_eq!(bands(&["streaming"]), (None, None));
    let (ok, json, _) = prism(&["plan", "--scoring", "second-order", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let subs = &json["config"]["scoring"]["second_order"];
    assert!(ok);
    assert_eq!((subs["query_sub"].as_u64(), subs["key_sub"].as_u64()), (Some(32), Some(16)));
    for (args, family, mass, shown) in [
        (&[][..], "llama", 0.95, "0.95, published for Llama"),
        (&["--shape", "llama-3.2-1b"], "llama", 0.95, "0.95, published for Llama"),
        (&["--shape", "qwen2.5-7b"], "qwen", 0.93, "0.93, published for Qwen"),
        (&["--shape", "qwen3-8b", "--mass", "0.9"], "qwen", 0.9, "0.9, as given"),
    ] {
        let (ok, json, _) = prism(&[&["plan", "--json"], args].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert!(ok);
        assert_eq!(json["preset"], family);
        assert_eq!(json["config"]["selection"]["budget"]["mass"], mass, "{json}");
        let (ok, text, _) = prism(&[&["plan"], args].concat());
        assert!(ok && text.contains(shown), "{text}");
    }
    let (ok, text, _) = prism(&["plan", "--tokens", "100"]);
    assert!(ok && text.contains("dense"), "{text}");
}

#[test]
fn bad_arguments_are_refused_with_a_reason() {
    let cases: [(&[&str], &str); 15] = [
        (&["plan", "--mass", "1.5"], "mass must be above 0 and at most 1, got 1.5"),
        (&["plan", "--q-heads", "7", "--kv-heads", "2"], "got 7 query and 2 kv"),
        (&["plan", "--shape", "gpt-2"], "\"gpt-2\""),
        (&["plan", "--shape", "qwen3-8b", "--model", "x"], "--model"),
        (&["plan", "--shape", "qwen3-8b", "--head-dim", "64"], "--head-dim"),
        (&["plan", "--dtype", "f64"], "element type must be f32, f16 or bf16"),
        (&["plan", "--device", "tpu"], "no device \"tpu\"; it has: flex"),
        (&["plan", "--block", "0"], "block size must be between 1"),
        (&["plan", "--query-sub", "32"], "need --scoring second-order"),
        (
            &["plan", "--scoring", "second-order", "--calibration", "off"],
            "--calibration is for --scoring bands",
        ),
        (
            &["plan", "--scoring", "second-order", "--key-sub", "48"],
            "key_sub must be 16 to 128 and divide the block of 128, got 48",
        ),
        (
            &["plan", "--scoring", "second-order", "--high-dims", "64", "--low-dims", "96"],
            "second-order scoring has none to set",
        ),
        (&["plan", "--high-dims", "3", "--low-dims", "96"], "high_dims must be even"),
        (
            &["ppl", "--model", "nowhere.gguf", "--file", "nothing.txt"],
            "no file or directory nowhere.gguf",
        ),
        (&["run", "--model", "x", "--prompt", "y", "--temperature", "-1"], "temperature"),
    ];
    for (args, says) in cases {
        let (ok, _, error) = prism(args);
        assert!(!ok, "{args:?}");
        assert!(error.contains(says), "{args:?} says {error}");
    }
}

/// Dense, in any chunks; with causal calibration in chunks of whole blocks.
#[test]
fn a_text_in_chunks_scores_as_the_whole() {
    let (_folder, model, file) = tiny_model();
    let ppl = |more: &[&str]| {
        let mut args = vec!["ppl", "--model", &model, "--file", &file, "--tokens", "300", "--json"];
        args.extend(more);
        let (ok, json, error) = prism(&args);
        assert!(ok, "{error}");
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        ["nll", "density"].map(|number| report[number].as_f64().unwrap())
    };
    let near = |a: [f64; 2], b: [f64; 2]| {
        assert!((a[0] - b[0]).abs() < 1e-4 && (a[1] - b[1]).abs() < 1e-9, "{a:?}, not {b:?}");
    };
    let dense = ["--attention", "dense"];
    near(ppl(&[&dense[..], &["--chunk", "70"]].concat()), ppl(&dense));
    let bands = ["--block", "16", "--high-dims", "16", "--low-dims", "24", "--dense-below", "0"];
    let causal = [&bands[..], &["--mass", "0.7", "--calibration", "causal"]].concat();
    let whole = ppl(&causal);
    assert!(whole[1] < 0.95, "{whole:?}");
    near(ppl(&[&causal[..], &["--chunk", "48"]].concat()), whole);
    let (ok, _, error) = prism(&["ppl", "--model", &model, "--file", &file, "--chunk", "0"]);
    assert!(!ok && error.contains("--chunk"), "{error}");
}

/// The whole program on a tiny model with random weights: what it prints is not text, but every
/// number must be there.
#[test]
fn ppl_and_compare_print_what_they_promise() {
    let (folder, model, file) = tiny_model();
    let (model, file) = (model.as_str(), file.as_str());
    let svg = folder.path().join("map.svg");

    let prism_args =
        ["--block", "16", "--high-dims", "16", "--low-dims", "24", "--dense-below", "0"];
    let ppl = |attention: &str| {
        let mut args = vec!["ppl", "--model", model, "--file", file, "--tokens", "300", "--json"];
        args.extend(["--attention", attention, "--mass", "0.7", "--dense-last-blocks", "0"]);
        args.extend(["--device", "flex"]);
        args.extend(prism_args);
        let (ok, json, error) = prism(&args);
        assert!(ok, "{error}");
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    let (dense, sparse) = (ppl("dense"), ppl("prism"));
    for (report, path) in [(&dense, "dense"), (&sparse, "sparse")] {
        assert_eq!(report["tokens"], 300);
        assert_eq!(report["path"], path);
        for number in ["nll", "perplexity", "density", "seconds", "attention_seconds"] {
            assert!(report[number].as_f64().unwrap() > 0.0, "{number} of {report}");
        }
    }
    assert_eq!(dense["density"], 1.0);
    assert!(sparse["density"].as_f64().unwrap() < 1.0);

    let mut args = vec!["compare", "--model", model, "--file", file, "--json", "--heatmap"];
    args.push(svg.to_str().unwrap());
    args.extend(prism_args);
    let (ok, json, error) = prism(&args);
    assert!(ok, "{error}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["top1_agreement"].as_f64().unwrap() > 0.0);
    assert_eq!(json["prism"]["density_by_layer"].as_array().unwrap().len(), 3);
    let drawn = std::fs::read_to_string(svg).unwrap();
    assert!(drawn.starts_with("<svg") && drawn.matches("<rect").count() > 300);

    let mut args = vec!["run", "--model", model, "--raw", "--prompt", "w1 w2 w3", "--json"];
    args.extend(["--max-tokens", "5", "--temperature", "0.8", "--seed", "3"]);
    let first = prism(&args);
    assert!(first.0, "{}", first.2);
    let json: serde_json::Value = serde_json::from_str(&first.1).unwrap();
    assert_eq!((json["prompt_tokens"].as_u64(), json["path"].as_str()), (Some(3), Some("dense")));
    let again: serde_json::Value = serde_json::from_str(&prism(&args).1).unwrap();
    assert_eq!(json["text"], again["text"], "the same seed gives the same text");
}

/// A policy file reaches the layers that it names; what contradicts it is refused.
#[test]
fn policies_come_from_files() {
    let (folder, model, file) = tiny_model();
    let (model, file) = (model.as_str(), file.as_str());
    let write = |name: &str, json: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, json).unwrap();
        path.to_str().unwrap().to_string()
    };
    let bands = r#""bands": {"dims": {"high": 16, "low": 24}}"#;
    let policy = write(
        "policy.json",
        &format!(
            r#"{{"block": 16, "base": {{"mass": 0.6, "dense_below": 0, {bands}}}, "layers": [
                {{"first": 0, "last": 0, "dense": true}},
                {{"first": 2, "last": 2, "set": {{"heads": [{{"heads": [1], "mass": 1.0}}]}}}}]}}"#
        ),
    );
    let json = |args: &[&str]| {
        let mut args = args.to_vec();
        args.extend(["--model", model, "--policy", &policy, "--json"]);
        let (ok, json, error) = prism(&args);
        assert!(ok, "{args:?}: {error}");
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    let densities = |report: &serde_json::Value| -> Vec<f64> {
        let all = report["density_by_layer"].as_array().unwrap();
        all.iter().map(|density| density.as_f64().unwrap()).collect()
    };
    let ppl = json(&["ppl", "--file", file, "--tokens", "300"]);
    assert_eq!(ppl["path"], "mixed");
    let by_layer = densities(&ppl);
    assert_eq!(by_layer[0], 1.0);
    assert!(by_layer[1] < 0.95 && by_layer[2] < 1.0, "{by_layer:?}");
    let compare = json(&["compare", "--file", file, "--tokens", "300"]);
    assert_eq!(densities(&compare["prism"]), by_layer);
    assert!(compare["mass"].is_null());
    let run = ["run", "--raw", "--prompt-file", file, "--max-tokens", "2", "--report", "density"];
    let by_head = json(&run)["density_by_head"].clone();
    assert_eq!((&by_head[0][0], &by_head[2][1]), (&1.0.into(), &1.0.into()));
    assert!(by_head[2][0].as_f64().unwrap() < 1.0, "{by_head}");

    let four = write("four.json", r#"{"layers": [{"first": 3, "last": 3, "dense": true}]}"#);
    let no_json = write("none.json", "mass: 0.9");
    let cases: [(&[&str], &str); 6] = [
        (&["--policy", &four], "there is no layer 3: the model has 3"),
        (&["--policy", &no_json], "not a policy: expected value"),
        (&["--policy", "nowhere.json"], "can't use nowhere.json"),
        (&["--policy", &policy, "--mass", "0.9"], "cannot be used with"),
        (&["--policy", &policy, "--dense-below", "0"], "cannot be used with"),
        (&["--policy", &policy, "--attention", "dense"], "--policy needs --attention prism"),
    ];
    for (more, says) in cases {
        let mut args = vec!["ppl", "--model", model, "--file", file];
        args.extend(more);
        let (ok, _, error) = prism(&args);
        assert!(!ok && error.contains(says), "{args:?} says {error}");
    }
}

/// Every device of the build that this machine has scores a text as the first does, dense and sparse.
#[test]
fn every_device_scores_alike() {
    let (_folder, model, file) = tiny_model();
    let (_, json, _) = prism(&["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut right = None;
    for device in doctor["devices"].as_array().unwrap() {
        let device = device["name"].as_str().unwrap();
        for attention in ["dense", "prism"] {
            let mut args = vec!["ppl", "--model", &model, "--file", &file, "--tokens", "100"];
            args.extend(["--device", device, "--attention", attention, "--mass", "1", "--json"]);
            args.extend(["--block", "16", "--high-dims", "16", "--low-dims", "24"]);
            args.extend(["--dense-below", "0"]);
            let (ok, json, error) = prism(&args);
            assert!(ok, "{device}: {error}");
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let nll = json["nll"].as_f64().unwrap();
            let right = *right.get_or_insert(nll);
            assert!((nll - right).abs() < 1e-4, "{device} {attention}: {nll}, not {right}");
        }
    }
}

#[test]
fn devices_are_refused_with_a_reason() {
    let (_, json, _) = prism(&["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&json).unwrap();
    for missing in doctor["missing"].as_array().unwrap() {
        let name = missing["name"].as_str().unwrap();
        let (ok, _, error) = prism(&["plan", "--device", name]);
        assert!(!ok && !error.contains("panicked"), "{error}");
        let reason = missing["reason"].as_str().unwrap();
        let advice = format!("--features {name}");
        assert!(error.contains(reason) || error.contains(&advice), "{name}: {error}");
    }
    let (ok, _, error) = prism(&["plan", "--device", "flex:1"]);
    assert!(!ok && error.contains("there is no flex:1, this machine has 1"), "{error}");
    let (ok, _, error) = prism(&["plan", "--device", "flex:one"]);
    assert!(!ok && error.contains("\"one\" is no index of a flex device"), "{error}");
}

#[test]
fn a_selector_has_its_own_options() {
    let set = ["plan", "--tokens", "131072", "--selector", "xattention", "--set", "stride=16"];
    let (ok, json, error) = prism(&[&set[..], &["--json"]].concat());
    assert!(ok, "{error}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["selector"], "xattention");
    assert_eq!(json["selects_by"], "tensor_ops");
    assert_eq!(json["config"]["selector"]["xattention"]["stride"], 16);
    let (ok, text, _) = prism(&set);
    assert!(ok && text.contains("xattention, by tensor ops"), "{text}");
    assert!(text.contains("stride=16, threshold=0.9"), "{text}");
    let by_scoring = ["plan", "--selector", "second_order", "--set", "mass=0.9", "--json"];
    let (ok, json, _) = prism(&by_scoring);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(ok);
    assert_eq!(json["selector"], "second_order");
    assert_eq!(json["config"]["selection"]["budget"]["mass"], 0.9);
}

#[test]
fn selectors_refuse_what_contradicts_them() {
    let refuse = |args: &[&str], says: &str| {
        let (ok, _, error) = prism(args);
        assert!(!ok && error.contains(says), "{args:?}: {error}");
    };
    refuse(&["plan", "--selector", "xatention"], "there is no xatention: there are prism,");
    refuse(&["plan", "--set", "stride=8"], "--selector");
    refuse(
        &["plan", "--selector", "lsh", "--set", "seed"],
        "--set must be KEY=VALUE, got \"seed\"",
    );
    refuse(
        &["plan", "--selector", "lsh", "--set", "sed=1"],
        "lsh has no option sed: it has buckets=16, rounds=4, seed=0",
    );
    refuse(
        &["plan", "--selector", "xattention", "--mass", "0.9"],
        "--mass is no setting of --selector xattention (stride=8, threshold=0.9)",
    );
    refuse(
        &["plan", "--selector", "oracle", "--set", "mass=0.9", "--mass", "0.8"],
        "--mass is no setting of --selector oracle (mass=0.9)",
    );
    for other in [["--scoring", "bands"], ["--calibration", "off"], ["--query-sub", "16"]] {
        let args = ["plan", "--selector", "lsh", other[0], other[1]];
        refuse(&args, "cannot be used with");
    }
    let ppl = ["ppl", "--model", "none.gguf", "--file", "none.txt", "--selector", "lsh"];
    refuse(&[&ppl[..], &["--policy", "none.json"]].concat(), "cannot be used with");
    refuse(&[&ppl[..], &["--attention", "dense"]].concat(), "--selector needs --attention prism");
    refuse(
        &[
            "bench",
            "prefill",
            "--device",
            "flex",
            "--random-weights",
            "--selector",
            "lsh",
            "--density",
            "0.2",
        ],
        "--density is no setting of --selector lsh (buckets=16, rounds=4, seed=0)",
    );
}

#[test]
fn is_every_method_timed_at_every_length() {
    let bench = ["bench", "selectors", "--device", "flex", "--dtype", "f32", "--shape"];
    let sizes = ["smollm2-135m", "--lengths", "512,256", "--window", "1", "--json"];
    let (ok, json, log) = prism(&[&bench[..], &sizes[..]].concat());
    assert!(ok, "{log}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let records = json["records"].as_array().unwrap();
    let mut names: Vec<_> = prism_core::SelectorConfig::names().to_vec();
    names.sort_unstable();
    for len in [256, 512] {
        let of_len = records.iter().filter(|record| record["kv_len"] == len);
        let mut timed: Vec<_> = of_len.map(|record| record["rung"].as_str().unwrap()).collect();
        timed.sort_unstable();
        assert_eq!(timed, names);
    }
    for record in records {
        let density = record["density"].as_f64().unwrap();
        assert!(record["ms"].as_f64().unwrap() > 0.0 && density > 0.0 && density <= 1.0);
        assert_eq!((&record["q_heads"], &record["head_dim"]), (&9.into(), &64.into()));
    }
    let refuse = |more: &[&str], message: &str| {
        let (ok, _, log) = prism(&[&bench[..], &["smollm2-135m"], more].concat());
        assert!(!ok && log.contains(message), "{log}");
    };
    refuse(&["--selector", "dense"], "dense chooses nothing: it attends exactly");
    refuse(&["--selector", "xattention:stride=3"], "stride");
    refuse(&["--lengths", "0"], "at least 1");
}
