//! Does a model fetched by its Hugging Face id run as the same model in a folder does, and does every way
//! in which fetching fails say what failed, and with which id? Against a hub on the loopback.

#[path = "support/hub.rs"]
mod hub;
#[allow(dead_code)] // It also runs the program, which here needs a hub.
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{DType, Device};
use hub::{COMMIT, Held, Hub, MISSING, OK};
use prism_models::{Checkpoint, Llama};
use serde_json::Value;

const ID: &str = "someone/tiny";

/// A sharded model with a tokenizer, in a folder that lives as long as the first of these, and a text.
fn sharded() -> (tempfile::TempDir, PathBuf, String) {
    let (folder, model, text) = support::tiny_model();
    let model = PathBuf::from(model);
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models/tiny-qwen3-yarn");
    for entry in std::fs::read_dir(fixture).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    std::fs::remove_file(model.join("golden.safetensors")).unwrap();
    (folder, model, text)
}

/// The files of a folder, and some that no model needs.
fn held(model: &Path) -> BTreeMap<String, Held> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(model).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        files.insert(name, Held::sound(std::fs::read(entry.path()).unwrap()));
    }
    for other in ["README.md", "pytorch_model.bin", "original/model-1-of-1.safetensors"] {
        files.insert(other.into(), Held::sound(b"not for us".to_vec()));
    }
    files
}

/// The program with a cache of its own, asking this hub and no other.
fn prism(endpoint: &str, cache: &Path, args: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prism"));
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_CACHE", "HF_TOKEN"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", cache);
    let output = command.args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn refused(endpoint: &str, id: &str) -> String {
    let cache = tempfile::tempdir().unwrap();
    let (ok, _, error) = prism(endpoint, cache.path(), &["plan", "--model", id]);
    assert!(!ok && !error.contains("panicked"), "{error}");
    assert!(error.contains(id), "{error}");
    error
}

fn logits(folder: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let llama = Llama::load(&checkpoint, DType::F32, &Device::flex(), &mut |_, _| {}).unwrap();
    let ids: Vec<u32> = (0..300).map(|i| i * i % 509).collect();
    let mut cache = llama.cache(ids.len(), 128).unwrap();
    llama.prefill(&ids, None, &mut cache, None).unwrap()
}

#[test]
fn a_model_fetched_by_its_id_is_the_one_in_the_folder() {
    let (_folder, model, text) = sharded();
    let hub = Hub::serve(ID, held(&model));
    let cache = tempfile::tempdir().unwrap();
    let measure = |model: &str| {
        let args = ["ppl", "--model", model, "--file", &text, "--attention", "prism", "--json"];
        let (ok, json, error) = prism(&hub.endpoint, cache.path(), &args);
        assert!(ok, "{error}");
        let report: Value = serde_json::from_str(&json).unwrap();
        (report["tokens"].clone(), report["nll"].clone(), report["density"].clone())
    };
    let fetched = measure(ID);
    let mut files: Vec<_> = std::fs::read_dir(&model)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(hub.handed_out(), files);
    let local = measure(model.to_str().unwrap());
    assert_eq!(fetched, local);
    let snapshot = cache.path().join(format!("hub/models--someone--tiny/snapshots/{COMMIT}"));
    assert_eq!(logits(&snapshot), logits(&model));

    // What the cache has is not fetched again.
    assert_eq!(measure(ID), local);
    assert_eq!(hub.handed_out(), [""; 0]);
}

#[test]
fn models_that_the_hub_lacks_are_refused_by_their_id() {
    let (_folder, model, _) = sharded();
    let hub = Hub::serve(ID, held(&model));
    let error = refused(&hub.endpoint, "someone/else");
    assert!(error.contains("can't fetch someone/else: "), "{error}");
    assert!(error.contains("has no such model") && error.contains("404"), "{error}");

    let mut files = held(&model);
    files.retain(|file, _| !file.starts_with("model-") || file.contains('/'));
    let hub = Hub::serve(ID, files);
    let error = refused(&hub.endpoint, ID);
    assert!(error.contains("can't fetch someone/tiny: it holds no safetensors"), "{error}");
}

/// One flaw after another in the second shard.
#[test]
fn files_that_do_not_come_whole_are_named_with_the_id() {
    let (_folder, model, _) = sharded();
    const SHARD: &str = "model-00002-of-00007.safetensors";
    let whole = std::fs::read(model.join(SHARD)).unwrap();
    let size = whole.len();
    let flaws = [
        (Held { size, head: MISSING, get: (MISSING, vec![]) }, "doesn't hand it out"),
        (Held { size, head: OK, get: (MISSING, b"gone".to_vec()) }, "got 4; delete "),
        (Held { size, head: OK, get: (OK, whole[..1000].to_vec()) }, "got 1000; delete "),
    ];
    for (flaw, says) in flaws {
        let mut files = held(&model);
        files.insert(SHARD.into(), flaw);
        let error = refused(&Hub::serve(ID, files).endpoint, ID);
        assert!(error.contains(SHARD) && error.contains(says), "{error}");
    }
    // What the hub itself doesn't list, the index does.
    let mut files = held(&model);
    files.remove(SHARD);
    let error = refused(&Hub::serve(ID, files).endpoint, ID);
    assert!(error.contains(SHARD), "{error}");
}

#[test]
fn a_hub_that_can_not_be_reached_is_named() {
    // Nobody listens where somebody did.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = refused(&format!("http://{closed}"), ID);
    let says = format!("can't fetch someone/tiny: no connection to http://{closed}");
    assert!(error.contains(&says), "{error}");
}

#[test]
fn what_is_no_id_is_refused_before_anything_is_asked() {
    for id in ["nowhere", "a/b/c", "/nowhere", "someone/", "./a/b"] {
        let error = refused("http://127.0.0.1:1", id);
        assert!(error.contains("nor an id of the form owner/name"), "{error}");
    }
}
