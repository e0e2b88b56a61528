//! Does any mutation of a model's files make a reader panic, or ask for more memory than the file
//! justifies? Headers, indexes, configurations and GGUF files that were right are damaged at random
//! and read to the last weight.
//!
//! A single request for memory may be at most four times the file, plus a page that even the
//! smallest file takes. `PROPTEST_CASES` says how many cases each of the four tests runs.

#[path = "../bad_files/support.rs"]
#[allow(dead_code)] // Shared with tests that need more of it.
mod support;

mod allocation;
mod mutation;

use std::path::Path;

use prism_models::{Checkpoint, ModelConfig};
use proptest::prelude::*;
use serde_json::json;
use support::{Gguf, safetensors};
use tempfile::TempDir;

use allocation::largest_request;
use mutation::{damage, edits};

#[global_allocator]
static COUNTING: allocation::Counting = allocation::Counting;

/// What even an empty file takes: paths, messages, the first nodes of a map.
const PAGE: usize = 4096;

/// Runs a reader of `bytes` and fails if it asks for more than they justify.
fn bounded<T>(bytes: usize, read: impl FnOnce() -> T) -> T {
    let (result, largest) = largest_request(read);
    let limit = 4 * bytes + PAGE;
    assert!(largest <= limit, "{largest} bytes asked for at once; the file has {bytes}");
    result
}

/// Opens a model and reads all its weights.
fn read_all(path: &Path, bytes: usize) {
    let Ok(checkpoint) = bounded(bytes, || Checkpoint::open(path)) else { return };
    checkpoint.audit();
    let names: Vec<_> = checkpoint.tensor_names().map(str::to_owned).collect();
    for name in names {
        let shape = checkpoint.shape(&name).unwrap().to_vec();
        let _ = bounded(bytes, || checkpoint.finite_f32_tensor(&name, &shape));
    }
}

fn config(architecture: &str, rope: serde_json::Value) -> serde_json::Value {
    json!({
        "architectures": [format!("{architecture}ForCausalLM")],
        "model_type": architecture.to_lowercase(),
        "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "head_dim": 4,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 3,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 16, "tie_word_embeddings": true,
        "eos_token_id": [1, 2], "sliding_window": null, "layer_types": ["full_attention"],
        "rope_parameters": rope,
    })
}

/// Configurations of every architecture and scaling.
fn configs() -> [String; 4] {
    [
        (
            "Llama",
            json!({ "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8 }),
        ),
        (
            "Qwen3",
            json!({ "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 4 }),
        ),
        ("Qwen2", json!({ "rope_type": "dynamic", "factor": 2.0 })),
        ("Mistral", json!({ "type": "linear", "factor": 2.0 })),
    ]
    .map(|(architecture, rope)| config(architecture, rope).to_string())
}

/// A header of tensors of every float type, and the bytes of their data.
fn header() -> (String, usize) {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""model.embed_tokens.weight":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]},"#,
        r#""model.norm.weight":{"dtype":"BF16","shape":[4],"data_offsets":[48,56]},"#,
        r#""a":{"dtype":"F16","shape":[2,2],"data_offsets":[56,64]},"#,
        r#""b":{"dtype":"F64","shape":[2],"data_offsets":[64,80]}}"#,
    );
    (header.into(), 80)
}

/// A directory of a model in one file.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), &configs()[0]).unwrap();
    let (header, data) = header();
    let weights = safetensors(&header, data);
    std::fs::write(directory.path().join("model.safetensors"), weights).unwrap();
    directory
}

/// A directory of a model in two files under an index, whose text comes with it.
fn sharded() -> (TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(directory.path().join(name), bytes).unwrap();
    };
    write("config.json", configs()[1].as_bytes());
    let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let two = r#"{"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},
        "c":{"dtype":"BF16","shape":[1,1],"data_offsets":[4,6]}}"#;
    write("model-00001-of-00002.safetensors", &safetensors(one, 8));
    write("model-00002-of-00002.safetensors", &safetensors(two, 6));
    let index = json!({ "metadata": { "total_size": 14 }, "weight_map": {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    } });
    write(INDEX, index.to_string().as_bytes());
    (directory, index.to_string())
}

const INDEX: &str = "model.safetensors.index.json";

/// A GGUF file with values and tensors of many types.
fn gguf() -> Vec<u8> {
    let ids = [&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 0, 0, 0, 2, 0, 0, 0]].concat();
    Gguf::new()
        .str("general.architecture", "llama")
        .u32("general.alignment", 32)
        .u32("llama.embedding_length", 4)
        .u32("llama.feed_forward_length", 4)
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 16)
        .u32("llama.attention.head_count", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .strings("tokenizer.ggml.tokens", &["a", "b", "c"])
        .pair("tokenizer.ggml.token_type", 9, &ids)
        .tensor("blk.0.attn_q.weight", &[4, 4], 0, 0)
        .tensor("blk.0.attn_k.weight", &[4, 4], 1, 64)
        .tensor("blk.0.ffn_up.weight", &[32, 2], 2, 96)
        .tensor("blk.0.ffn_down.weight", &[32, 1], 8, 160)
        .bytes()
}

#[test]
fn are_the_undamaged_files_read() {
    for config in configs() {
        ModelConfig::from_hugging_face(config.as_bytes()).unwrap();
    }
    for directory in [directory(), sharded().0] {
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        assert!(checkpoint.tensor_names().count() >= 3);
        read_all(directory.path(), 1 << 10);
    }
    let file = support::file("model.gguf", &gguf());
    assert_eq!(Checkpoint::open(&file.path).unwrap().tensor_names().count(), 4);
    read_all(&file.path, gguf().len());
}

#[test]
fn is_a_request_for_memory_noticed() {
    let (kept, largest) = largest_request(|| Vec::<u8>::with_capacity(123_457));
    assert_eq!(largest, kept.capacity());
    let (mut kept, largest) = largest_request(|| vec![0u8; 10]);
    assert!(largest < 100);
    let ((), largest) = largest_request(|| kept.resize(54_321, 1));
    assert!(largest >= 54_321);
}

proptest! {
    #[test]
    fn do_damaged_safetensors_leave_the_reader_whole(
        in_header in edits(), in_file in prop::option::of(edits())
    ) {
        let (header, data) = header();
        let header = damage(header.as_bytes(), &in_header);
        // The length is right, so that the damage within is reached.
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.resize(bytes.len() + data, 0x3c);
        if let Some(edits) = in_file {
            bytes = damage(&bytes, &edits);
        }
        let directory = directory();
        std::fs::write(directory.path().join("model.safetensors"), &bytes).unwrap();
        let size = bytes.len() + configs()[0].len();
        read_all(directory.path(), size);
    }

    #[test]
    fn do_damaged_indexes_leave_the_reader_whole(edits in edits()) {
        let (directory, index) = sharded();
        let bytes = damage(index.as_bytes(), &edits);
        std::fs::write(directory.path().join(INDEX), &bytes).unwrap();
        let size = bytes.len() + configs()[1].len();
        read_all(directory.path(), size);
    }

    #[test]
    fn do_damaged_configurations_leave_the_reader_whole(which in 0usize..4, edits in edits()) {
        let bytes = damage(configs()[which].as_bytes(), &edits);
        if let Ok(config) = bounded(bytes.len(), || ModelConfig::from_hugging_face(&bytes)) {
            // Sizes that were let through are sizes that can be worked with.
            let _ = config.rope.inv_freq(config.head_dim);
            let _ = bounded(bytes.len(), || config.with_generation_config(&bytes));
        }
    }

    #[test]
    fn do_damaged_gguf_files_leave_the_reader_whole(edits in edits()) {
        let bytes = damage(&gguf(), &edits);
        let file = support::file("model.gguf", &bytes);
        read_all(&file.path, bytes.len());
    }
}
