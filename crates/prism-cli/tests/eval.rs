//! Do the studies of `prism eval` run whole, on a tiny model with random weights? What the model says means
//! nothing; every number must be there, agree with itself, and be the same when a study is resumed.

mod support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::{prism, tiny_model};

/// The JSON that a study prints.
fn study(args: &[&str]) -> Value {
    let (ok, json, error) = prism(&[&["eval"], args, &["--json"]].concat());
    assert!(ok, "{args:?}: {error}");
    serde_json::from_str(&json).unwrap()
}

/// A report without its seconds, which differ from run to run.
fn timeless(mut value: Value) -> Value {
    match &mut value {
        Value::Object(all) => {
            all.remove("seconds");
            all.values_mut().for_each(|value| *value = timeless(value.take()));
        }
        Value::Array(all) => all.iter_mut().for_each(|value| *value = timeless(value.take())),
        _ => {}
    }
    value
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn path(path: &Path) -> String {
    path.to_str().unwrap().into()
}

const PRISM: &str = "prism:mass=0.6,block=16,high_dims=16,low_dims=24,dense_last_blocks=0";
const SECOND: &str = "second_order:mass=0.6,block=16,query_sub=16";

#[test]
fn is_perplexity_the_same_when_resumed_and_that_of_ppl() {
    let (folder, model, file) = tiny_model();
    let out = path(&folder.path().join("out"));
    let base = ["perplexity", "--model", &model, "--file", &file, "--tokens", "300"];
    let cut = ["--window", "150", "--bucket", "50"];
    let both = [&base[..], &cut, &["--selector", PRISM, "--selector", SECOND]].concat();
    let whole = timeless(study(&both));
    // First one selector, then both; then both from what is held.
    let first = [&base[..], &cut, &["--selector", PRISM, "--out", &out]].concat();
    study(&first);
    let again = [&both[..], &["--out", &out]].concat();
    assert_eq!(timeless(study(&again)), whole);
    let held = fs::read_to_string(Path::new(&out).join("results.jsonl")).unwrap();
    assert_eq!(timeless(study(&again)), whole);
    assert_eq!(fs::read_to_string(Path::new(&out).join("results.jsonl")).unwrap(), held);
    for file in ["report.json", "table.md", "scores.csv", "positions.csv", "positions.svg"] {
        assert!(Path::new(&out).join(file).is_file(), "{file}");
    }

    let scores = whole["scores"].as_array().unwrap();
    let names: Vec<_> = scores.iter().map(|score| score["attend"].as_str().unwrap()).collect();
    assert_eq!(names, ["dense", PRISM, SECOND]);
    for score in scores {
        assert_eq!(score["tokens"], 299);
        let of: Vec<&Value> = whole["buckets"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|bucket| bucket["attend"] == score["attend"])
            .collect();
        let sum: f64 = of.iter().map(|b| number(&b["nll"]) * number(&b["tokens"])).sum();
        assert!((sum / 299.0 - number(&score["nll"])).abs() < 1e-9);
        assert_eq!(of.len(), 3);
    }
    assert_eq!((number(&scores[0]["loss"]), number(&scores[0]["density"])), (0.0, 1.0));
    assert!(number(&scores[1]["density"]) < 1.0 && number(&scores[2]["density"]) < 1.0);

    // In one window it is what `prism ppl` says.
    let one = study(&[&base[..], &["--selector", "dense"]].concat());
    let args = ["ppl", "--model", &model, "--file", &file, "--tokens", "300", "--json"];
    let (_, json, _) = prism(&[&args[..], &["--attention", "dense"]].concat());
    let ppl: Value = serde_json::from_str(&json).unwrap();
    assert!((number(&one["scores"][0]["nll"]) - number(&ppl["nll"])).abs() < 1e-9);

    // Another bucket is another study.
    let other = [&base[..], &["--out", &out, "--window", "150", "--bucket", "60"]].concat();
    let (ok, _, error) = prism(&[&["eval"], &other[..]].concat());
    assert!(!ok && error.contains("reading was") && error.contains("other settings"), "{error}");
}

#[test]
fn are_needles_and_ruler_asked_scored_and_resumed() {
    let (folder, model, _) = tiny_model();
    let out = path(&folder.path().join("needle"));
    let ways = ["--selector", "dense", "--selector", PRISM];
    let needle = ["needle", "--model", &model, "--lengths", "200,300", "--depths", "0,100"];
    let whole = study(&[&needle[..], &ways].concat());
    let fewer = ["needle", "--model", &model, "--lengths", "200", "--depths", "100", "--out", &out];
    study(&[&fewer[..], &["--selector", PRISM]].concat());
    let resumed = study(&[&needle[..], &ways, &["--out", &out]].concat());
    assert_eq!(timeless(resumed), timeless(whole.clone()));
    let cases = whole["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let length: f64 = case["task"].as_str().unwrap().parse().unwrap();
        let tokens = number(&case["prompt_tokens"]);
        assert!(tokens + 30.0 <= length && tokens + 60.0 > length, "{case}");
        assert_eq!(case["attend"] == "dense", number(&case["density"]) == 1.0);
    }
    let map = Path::new(&out).join("needle-dense.svg");
    assert!(fs::read_to_string(map).unwrap().contains("100 %"));

    let qa = folder.path().join("little.jsonl");
    let line = r#"{"question": "Who?", "answers": ["Ann"], "documents": ["Ann did it."]}"#;
    fs::write(&qa, format!("{line}\n")).unwrap();
    let tasks = "niah_single_1,niah_multikey_3,vt,cwe,fwe";
    let ruler = study(&[
        "ruler",
        "--model",
        &model,
        "--lengths",
        "900",
        "--tasks",
        tasks,
        "--samples",
        "2",
        "--selector",
        "dense",
        "--qa",
        &path(&qa),
    ]);
    let cases = ruler["cases"].as_array().unwrap();
    let names: Vec<_> = cases.iter().map(|case| case["task"].as_str().unwrap()).collect();
    let right = ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe", "qa_little"];
    assert_eq!(names, right);
    assert_eq!((&cases[0]["questions"], &cases[5]["questions"]), (&2.into(), &1.into()));
    assert_eq!(ruler["means"][0]["tasks"], 6);
    assert_eq!(ruler["answers"].as_array().unwrap().len(), 11);
}

#[test]
fn are_benchmarks_read_from_local_copies() {
    let (folder, model, _) = tiny_model();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    let text = "w1 w2 w3 ".repeat(150);
    let line = serde_json::json!({
        "input": "w5", "context": text, "answers": ["w7"], "all_classes": ["w7", "w8"],
    });
    for set in ["hotpotqa", "trec"] {
        fs::write(data.join(format!("{set}.jsonl")), format!("{line}\n{line}\n")).unwrap();
    }
    let line = serde_json::json!({"id": 0, "context": text, "input": "w5", "answer": "71432"});
    fs::write(data.join("passkey.jsonl"), format!("{line}\n")).unwrap();
    let data = path(&data);
    let both = ["--selector", "dense", "--selector", PRISM];
    let long =
        ["longbench", "--model", &model, "--data", &data, "--samples", "1", "--length", "250"];
    let long = study(&[&long[..], &both].concat());
    let cases = long["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    assert!(cases.iter().all(|case| number(&case["prompt_tokens"]) <= 251.0), "{cases:?}");
    assert_eq!(long["groups"].as_array().unwrap().len(), 6);
    let infinite = study(&["infinitebench", "--model", &model, "--data", &data]);
    assert_eq!(infinite["cases"][0]["task"], "passkey");
    assert_eq!(infinite["cases"][0]["questions"], 1);
}

#[test]
fn do_recall_spectrum_and_ablations_agree_with_themselves() {
    let (folder, model, file) = tiny_model();
    let out = |name: &str| path(&folder.path().join(name));
    let text = ["--model", &model, "--file", &file, "--tokens", "300"];
    let ways = [
        "--selector",
        "prism:block=16,high_dims=16,low_dims=24",
        "--selector",
        SECOND,
        "--mass",
        "0.5,1.0",
    ];
    let recall = [&["recall"], &text[..], &ways].concat();
    let whole = study(&recall);
    let means = whole["means"].as_array().unwrap();
    assert_eq!((means.len(), whole["heads"].as_array().unwrap().len()), (3, 3 * 3 * 4));
    // Of the whole mass nothing is lost.
    let all = &means[1];
    assert!(number(&all["lost"]) < 1e-5 && number(&all["error"]) < 1e-3, "{all}");
    assert_eq!(number(&all["density"]), 1.0);
    let some = &means[0];
    assert!(number(&some["lost"]) > 0.0 && number(&some["error"]) > 0.0, "{some}");
    assert!((number(&some["kept"]) + number(&some["lost"]) - 1.0).abs() < 1e-12);
    // Resumed after some layers, it is the same.
    let folder = out("recall");
    study(&[&recall[..], &["--layers", "1", "--out", &folder]].concat());
    assert_eq!(study(&[&recall[..], &["--out", &folder]].concat()), whole);
    for file in ["heads.csv", "pareto.csv", "pareto.svg"] {
        assert!(Path::new(&folder).join(file).is_file(), "{file}");
    }

    let folder = out("spectrum");
    let spectrum =
        study(&[&["spectrum"], &text[..], &["--block", "16", "--out", &folder]].concat());
    let zones = spectrum["zones"].as_array().unwrap();
    for zone in zones {
        assert!(number(&zone["q_pooled"]) <= number(&zone["q_token"]) * 1.000_01, "{zone}");
        assert!(number(&zone["q_ratio"]) > 0.0 && number(&zone["k_ratio"]) > 0.0);
    }
    let dims =
        zones.iter().filter(|zone| zone["layer"].is_null()).map(|zone| number(&zone["dims"]));
    assert_eq!(2.0 * spectrum["pairs"].as_array().unwrap().len() as f64 / 4.0, dims.sum::<f64>());
    assert!(fs::read_to_string(Path::new(&folder).join("spectrum.svg")).unwrap().contains("λ"));

    let folder = out("ablate");
    let ablate =
        [&["ablate"], &text[..], &["--vary", "mass,calibration", "--mass", "0.4,1"]].concat();
    let points = study(&[&ablate[..], &["--out", &folder]].concat());
    let points = points.as_array().unwrap();
    assert_eq!(points.len(), 2 + 6);
    for point in points.iter().filter(|point| point["mass"] == 1.0) {
        assert!(number(&point["loss"]).abs() < 1e-4, "{point}");
    }
    assert!(Path::new(&folder).join("calibration.svg").is_file());
}

/// The oracle selects by the masses that the study measures: of each row it loses at most what its own
/// share leaves.
#[test]
fn do_all_selectors_go_through_and_does_the_oracle_keep_its_share() {
    let (_folder, model, file) = tiny_model();
    let names = burn_prism::SelectorConfig::names().map(|name| format!("{name}:block=16"));
    let mut args = vec!["recall", "--model", &model, "--file", &file, "--tokens", "300"];
    for name in &names {
        args.extend(["--selector", name]);
    }
    args.extend(["--mass", "0.8", "--layers", "0,2"]);
    let report = study(&args);
    let means = report["means"].as_array().unwrap();
    assert_eq!(means.len(), names.len());
    for mean in means {
        let (density, lost) = (number(&mean["density"]), number(&mean["lost"]));
        assert!(density > 0.0 && density <= 1.0 && (0.0..1.0).contains(&lost), "{mean}");
    }
    let heads = report["heads"].as_array().unwrap();
    let oracle = |head: &&Value| head["attend"].as_str().unwrap().starts_with("oracle");
    assert_eq!(heads.iter().filter(oracle).count(), 2 * 4);
    for head in heads.iter().filter(oracle) {
        assert!(number(&head["lost"]) <= 0.2 + 1e-3 && number(&head["density"]) < 1.0, "{head}");
    }
}

#[test]
fn does_the_help_name_every_setting_to_vary() {
    let (ok, help, _) = prism(&["eval", "ablate", "--help"]);
    for axis in prism_eval::ablate::Axis::ALL {
        assert!(ok && help.contains(axis.name()), "{}", axis.name());
    }
}

#[test]
fn is_what_cannot_be_measured_refused_by_name() {
    let (_folder, model, file) = tiny_model();
    let text = ["--model", &model, "--file", &file];
    let cases: [(&[&str], &[&str], &str); 8] = [
        (&["perplexity"], &["--selector", "prism:colour=red"], "colour"),
        (&["perplexity"], &["--window", "1"], "window must be at least 2 tokens, got 1"),
        (&["perplexity"], &["--bucket", "0"], "bucket must be at least 1 position, got 0"),
        (&["perplexity"], &["--mass", "1.5"], "mass"),
        (&["recall"], &["--layers", "9"], "layer must be below 3, got 9"),
        (&["recall"], &["--selector", "dense"], "selects nothing"),
        (&["spectrum"], &["--block", "100000"], "block must be 1 to the"),
        (&["ablate"], &["--vary", "depth"], "block, pool-block, dense-last-blocks"),
    ];
    for (study, args, says) in cases {
        let (ok, _, error) = prism(&[&["eval"], study, &text[..], args].concat());
        assert!(!ok && error.contains(says), "{study:?} {args:?} says {error}");
    }
    let ruler = ["eval", "ruler", "--model", &model];
    for (args, says) in [
        (&[][..], "niah_single_2 hides things in a text"),
        (&["--tasks", "none"], "leaves nothing to ask"),
        (&["--tasks", "vt", "--lengths", "20"], "leaves no room"),
        (&["--tasks", "niah"], "no such task"),
    ] {
        let (ok, _, error) = prism(&[&ruler[..], args].concat());
        assert!(!ok && error.contains(says), "{args:?} says {error}");
    }
    let empty = ["eval", "longbench", "--model", &model, "--data", "/no/such/folder"];
    let (ok, _, error) = prism(&empty);
    assert!(!ok && error.contains("holds no data"), "{error}");
}

#[test]
fn is_csv_printed_alone() {
    let (_folder, model, file) = tiny_model();
    let args = ["eval", "spectrum", "--model", &model, "--file", &file, "--block", "16", "--csv"];
    let (ok, text, error) = prism(&args);
    assert!(ok, "{error}");
    let mut tables = text.split("\n\n");
    let zones = tables.next().unwrap();
    assert!(zones.starts_with("layer,zone,dims,q_token,"), "{zones}");
    let columns = zones.lines().next().unwrap().split(',').count();
    assert!(zones.lines().all(|line| line.split(',').count() == columns));
    assert!(tables.next().unwrap().starts_with("layer,pair,turns,attenuation,"));
}
