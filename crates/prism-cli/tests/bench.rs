//! Does `prism bench` time every step, write what it measured, and refuse what it can't time? On CubeCL's
//! CPU runtime, which needs no GPU.

use std::process::Command;

fn prism(args: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_prism")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn refused(args: &[&str]) -> String {
    let (ok, _, error) = prism(args);
    assert!(!ok && !error.contains("panicked"), "{args:?}: {error}");
    error
}

#[test]
fn devices_without_these_kernels_are_refused() {
    for device in ["flex", "ndarray", "flex:1"] {
        for what in ["attention", "matmul"] {
            let error = refused(&["bench", what, "--device", device]);
            assert!(error.contains("no kernels of CubeCL"), "{error}");
            #[cfg(feature = "cpu")]
            assert!(error.contains("of those: cpu"), "{error}");
        }
    }
    let error = refused(&["bench", "attention", "--device", "tpu"]);
    assert!(error.contains("no device \"tpu\"; it has:"), "{error}");
}

#[cfg(feature = "cpu")]
mod on_cpu {
    use prism_bench::attention::STEPS;
    use serde_json::Value;

    use super::*;

    /// Windows are short: nothing is said about the times.
    const TINY: [&str; 14] = [
        "bench",
        "attention",
        "--device",
        "cpu",
        "--lengths",
        "256",
        "--q-heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "64",
        "--window",
        "5",
    ];

    fn tiny<'a>(more: &[&'a str]) -> Vec<&'a str> {
        TINY.iter().copied().chain(more.iter().copied()).collect()
    }

    #[test]
    fn every_phase_is_printed_and_written() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().to_str().unwrap();
        let args =
            tiny(&["--dtype", "f32", "--densities", "0.5", "--seconds", "300", "--out", out]);
        let (ok, text, error) = prism(&args);
        assert!(ok, "{error}");
        // The one rung of this device scores only rows that it searches.
        for phase in STEPS.into_iter().filter(|&step| step != "score") {
            let says = |line: &&str| line.split_whitespace().any(|word| word == phase);
            let row = text.lines().filter(says).find(|line| line.contains(" d=64 "));
            let row = row.unwrap_or_else(|| panic!("no {phase} in {text}"));
            assert!(row.contains('(') && row.contains("256 tokens"), "{row}");
        }
        let whole = "whole Prism = pool + calibrate + select + schedule + attend = ";
        assert!(text.contains(whole) && text.contains("against own dense "), "{text}");
        let run = std::fs::read_to_string(folder.path().join("run.json")).unwrap();
        let run: Value = serde_json::from_str(&run).unwrap();
        for record in run["records"].as_array().unwrap() {
            assert!(record["ms"].as_f64().unwrap() > 0.0 && record["ms_burst"].is_number());
        }
        for file in ["table.md", "records.csv", "latency.svg", "breakdown.svg"] {
            assert!(folder.path().join(file).is_file(), "no {file}");
        }
    }

    #[test]
    fn a_rung_that_timed_nothing_is_named_with_the_reason() {
        let (ok, text, error) = prism(&tiny(&["--rungs", "hopper,unit", "--only", "dense"]));
        assert!(ok, "{error}");
        assert!(
            text.contains("nothing was timed by hopper: ") && !text.contains("by unit"),
            "{text}"
        );
    }

    #[test]
    fn json_is_one_object_of_what_was_asked() {
        let (ok, text, error) = prism(&tiny(&["--only", "pool", "--json"]));
        assert!(ok, "{error}");
        let run: Value = serde_json::from_str(&text).unwrap();
        let records = run["records"].as_array().unwrap();
        assert!(!records.is_empty());
        for record in records {
            assert_eq!((&record["what"], &record["dtype"]), (&"pool".into(), &"bf16".into()));
        }
        assert_eq!(run["wholes"], serde_json::json!([]));
    }

    #[test]
    fn bad_values_are_refused_with_limit_and_value() {
        let cases: [(&[&str], &str); 15] = [
            (&["--lengths", "256,0"], "length must be at least 1, got 0"),
            (&["--lengths", "99999999"], "at most 65536 key blocks, got 781250"),
            (&["--q-heads", "0"], "query heads must be at least 1, got 0"),
            (&["--kv-heads", "0"], "kv heads must be at least 1, got 0"),
            (&["--q-heads", "7", "--kv-heads", "2"], "got 7 query and 2 kv"),
            (&["--head-dim", "0"], "head_dim must be at least 1, got 0"),
            (&["--head-dim", "512"], "head_dim must be at most 256, got 512"),
            (&["--dtype", "f64"], "element type must be f32, f16 or bf16, got \"f64\""),
            (&["--densities", "0"], "density must be above 0 and at most 1, got 0"),
            (&["--densities", "0.1,1.5"], "density must be above 0 and at most 1, got 1.5"),
            (&["--densities", "-1"], "density must be above 0 and at most 1, got -1"),
            (&["--only", "poll"], "there is no step \"poll\", there are rotate, rotate-pool"),
            (&["--rungs", "wgmma"], "there is no rung \"wgmma\", there are hopper"),
            (&["--seconds", "0"], "seconds must be above 0 and at most 1000000, got 0"),
            (&["--window", "-5"], "window must be above 0 and at most 1000000, got -5"),
        ];
        for (more, says) in cases {
            let mut args = vec!["bench", "attention", "--device", "cpu"];
            args.extend(more);
            let error = refused(&args);
            assert!(error.contains(says), "{more:?} says {error}");
        }
    }

    #[test]
    fn products_say_why_they_cannot_run() {
        let matmul = ["bench", "matmul", "--device", "cpu"];
        let error = refused(&matmul);
        assert!(error.contains("the product 131072×6144×4096 can't run here"), "{error}");
        assert!(error.contains("the device is not of sm_90"), "{error}");
        for (shape, says) in [("4096x4096", "a product is MxNxK"), ("axbxc", "got \"axbxc\"")] {
            let error = refused(&[&matmul[..], &["--shapes", shape]].concat());
            assert!(error.contains(says), "{error}");
        }
    }

    const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/models");

    #[test]
    fn a_models_first_token_is_timed_in_its_parts() {
        for name in ["tiny-llama31", "tiny-qwen2", "tiny-qwen3-yarn"] {
            first_token(name);
        }
    }

    fn first_token(name: &str) {
        let model = format!("{MODELS}/{name}");
        let args = ["bench", "prefill", "--device", "flex", "--shape", &model, "--random-weights"];
        let more = ["--lengths", "700", "--dtype", "f32", "--density", "0.5", "--json"];
        let (ok, text, error) = prism(&[&args[..], &more[..]].concat());
        assert!(ok, "{error}");
        let run: Value = serde_json::from_str(&text).unwrap();
        let ms = |rung: &str, part: &str| {
            let mut records = run["records"].as_array().unwrap().iter();
            let found = records.find(|record| {
                record["rung"] == rung && record["what"].as_str().unwrap().ends_with(part)
            });
            found.unwrap_or_else(|| panic!("no {rung} {part} in {text}"))["ms"].as_f64().unwrap()
        };
        for rung in ["prism", "dense"] {
            for part in [name, "linear layers", "attention", "rest"] {
                assert!(ms(rung, part) > 0.0, "{name}: {rung} {part}");
            }
        }
        assert!(ms("prism", "pool, select") > 0.0);
        // Of the 21 pairs of six blocks the last row has 6, and no row has less than one.
        let density = run["records"][0]["density"].as_f64().unwrap();
        assert!((0.5..0.95).contains(&density), "{density}");
        assert!(run["notes"][0].as_str().unwrap().contains("random weights"), "{text}");
    }

    #[test]
    fn prefills_that_make_no_sense_are_refused() {
        let refused =
            |more: &[&str]| refused(&[&["bench", "prefill", "--device", "cpu"][..], more].concat());
        assert!(refused(&[]).contains("--random-weights"));
        let random = "--random-weights";
        let error = refused(&[random, "--shape", "gpt-2"]);
        assert!(error.contains("no shape \"gpt-2\"; there are llama-3.1-8b"), "{error}");
        let error = refused(&[random, "--density", "0"]);
        assert!(error.contains("density must be above 0 and at most 1, got 0"), "{error}");
        assert!(refused(&[random, "--lengths", "0"]).contains("length must be at least 1"));
        assert!(refused(&[random, "--chunk", "0"]).contains("chunk must be at least 1"));
        let model = format!("{MODELS}/tiny-llama31");
        let error = refused(&[random, "--shape", &model, "--dtype", "f64"]);
        assert!(error.contains("got \"f64\""), "{error}");
    }
}
