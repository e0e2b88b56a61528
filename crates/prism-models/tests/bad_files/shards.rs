//! Indexes of weights in several files, and files that are not as their index says.

use std::path::Path;

use prism_models::LoadError;
use prism_models::safetensors_dir::SafetensorsDir;
use prism_models::shards::IndexError;
use serde_json::json;
use tempfile::TempDir;

use crate::support::safetensors;

const INDEX: &str = "model.safetensors.index.json";

/// A safetensors file of these tensors, one byte each.
fn shard(tensors: &[&str]) -> Vec<u8> {
    let entries = tensors.iter().enumerate().map(|(i, name)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    safetensors(&header, tensors.len())
}

/// Two shards, `a` and `b` in the first, `c` in the second, under an index of this text.
fn directory(index: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes);
    write("1.safetensors", &shard(&["a", "b"])).unwrap();
    write("2.safetensors", &shard(&["c"])).unwrap();
    write(INDEX, index.as_bytes()).unwrap();
    directory
}

fn map(weights: serde_json::Value) -> String {
    json!({ "metadata": { "total_size": 3 }, "weight_map": weights }).to_string()
}

fn right() -> serde_json::Value {
    json!({ "a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors" })
}

/// The right index with one entry replaced or added.
fn with(tensor: &str, file: &str) -> String {
    let mut weights = right();
    weights[tensor] = file.into();
    map(weights)
}

fn refusal(directory: &Path) -> IndexError {
    match SafetensorsDir::open(directory).unwrap_err() {
        LoadError::Index { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn are_two_shards_read_as_one() {
    let directory = directory(&map(right()));
    let weights = SafetensorsDir::open(directory.path()).unwrap();
    assert_eq!(weights.weights().tensor_names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(weights.weights().tensor_info("c").unwrap().shape, [1]);
    assert!(weights.weights().tensor_info("d").is_none());
}

#[test]
fn are_paths_that_leave_the_directory_refused() {
    for file in [
        "../1.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "./1.safetensors",
        "sub/1.safetensors",
        "1.safetensors/",
        "..\\1.safetensors",
        "a\0b",
    ] {
        let directory = directory(&with("b", file));
        let error = refusal(directory.path());
        assert!(matches!(&error, IndexError::Escapes { tensor, file: got }
            if tensor == "b" && got == file));
        assert!(error.to_string().contains("the directory of the index"), "{error}");
    }
}

/// The hub's cache is made of links.
#[cfg(unix)]
#[test]
fn are_links_out_of_the_directory_followed() {
    let directory = directory(&map(right()));
    let elsewhere = tempfile::tempdir().unwrap();
    let (link, target) = (directory.path().join("2.safetensors"), elsewhere.path().join("blob"));
    std::fs::rename(&link, &target).unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    assert!(SafetensorsDir::open(directory.path()).is_ok());
}

#[test]
fn is_a_missing_shard_named() {
    let error = refusal(directory(&with("c", "3.safetensors")).path());
    assert!(matches!(error, IndexError::MissingShard { file } if file == "3.safetensors"));
}

#[test]
fn is_a_tensor_of_the_index_in_no_shard_named() {
    let error = refusal(directory(&with("d", "2.safetensors")).path());
    assert!(matches!(error, IndexError::NotInShard { tensor, file }
        if tensor == "d" && file == "2.safetensors"));
}

#[test]
fn is_a_tensor_in_another_shard_than_the_index_says_refused() {
    let error = refusal(directory(&with("b", "2.safetensors")).path());
    assert!(matches!(error, IndexError::NotInShard { tensor, file }
        if tensor == "b" && file == "2.safetensors"));
}

#[test]
fn is_a_tensor_outside_the_index_refused() {
    let weights = json!({ "a": "1.safetensors", "c": "2.safetensors" });
    let error = refusal(directory(&map(weights)).path());
    assert!(matches!(error, IndexError::NotInIndex { tensor, file }
        if tensor == "b" && file == "1.safetensors"));
}

#[test]
fn is_a_tensor_in_two_shards_refused() {
    let directory = directory(&map(right()));
    std::fs::write(directory.path().join("2.safetensors"), shard(&["c", "a"])).unwrap();
    let error = refusal(directory.path());
    assert!(matches!(error, IndexError::Twice { tensor, first, second }
        if tensor == "a" && first == "1.safetensors" && second == "2.safetensors"));
}

#[test]
fn is_a_malformed_index_refused() {
    let twice = r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#;
    for index in ["", "[]", "{}", r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":1}}"#, twice] {
        let directory = directory(index);
        match SafetensorsDir::open(directory.path()).unwrap_err() {
            LoadError::EmptyFile { .. } => assert!(index.is_empty()),
            LoadError::Index { source: IndexError::Json(_), .. } => {}
            other => panic!("{index}: {other}"),
        }
    }
}

#[test]
fn are_more_files_than_any_model_has_refused() {
    let weights: serde_json::Map<_, _> =
        (0..1025).map(|i| (format!("t{i}"), format!("{i}.safetensors").into())).collect();
    let error = refusal(directory(&map(weights.into())).path());
    assert!(matches!(error, IndexError::TooManyShards { limit: 1024, got: 1025 }));
}

#[test]
fn is_an_index_of_more_than_32_mebibytes_refused() {
    let directory = directory("{}");
    let index = std::fs::File::create(directory.path().join(INDEX)).unwrap();
    index.set_len((32 << 20) + 1).unwrap();
    let error = SafetensorsDir::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::FileTooLarge { limit: 33_554_432, .. }));
}

#[test]
fn is_a_shard_that_is_no_safetensors_file_refused() {
    let directory = directory(&map(right()));
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    std::fs::write(directory.path().join("2.safetensors"), pointer).unwrap();
    let error = SafetensorsDir::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::LfsPointer { .. }));
    std::fs::write(directory.path().join("2.safetensors"), [0; 7]).unwrap();
    let error = SafetensorsDir::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::Safetensors { path, .. }
        if path.ends_with("2.safetensors")));
}
