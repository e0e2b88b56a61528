//! How much host memory does loading take beside the weights themselves? At most 1.2 times the
//! largest shard, even where that shard is a single tensor.
//!
//! Each measurement has a process to itself: the test starts its own program again and reads the
//! peak of its resident memory (`VmHWM`), which counts mapped pages too. Linux only.
#![cfg(target_os = "linux")]

use std::path::Path;

use burn::tensor::{DType, Device};
use half::bf16;
use prism_models::{Checkpoint, Llama};
use serde_json::{Map, Value, json};

const MIB: usize = 1 << 20;
/// Names the directory to the process that measures.
const MEASURE: &str = "PRISM_MEASURE_HOST_MEMORY";

const HIDDEN: usize = 1024;
const INNER: usize = 8192;
const VOCAB: usize = 32768;
/// The embeddings alone: 64 MiB.
const LARGEST: usize = VOCAB * HIDDEN * 2;

type Tensors = Vec<(String, Vec<usize>)>;

fn layer() -> Tensors {
    let tensor = |name: &str, shape: &[usize]| (format!("model.layers.0.{name}"), shape.to_vec());
    let mut tensors: Tensors = ["q", "k", "v", "o"]
        .map(|part| tensor(&format!("self_attn.{part}_proj.weight"), &[HIDDEN, HIDDEN]))
        .into();
    tensors.push(tensor("mlp.gate_proj.weight", &[INNER, HIDDEN]));
    tensors.push(tensor("mlp.up_proj.weight", &[INNER, HIDDEN]));
    tensors.push(tensor("mlp.down_proj.weight", &[HIDDEN, INNER]));
    tensors.push(tensor("input_layernorm.weight", &[HIDDEN]));
    tensors.push(tensor("post_attention_layernorm.weight", &[HIDDEN]));
    tensors.push(("model.norm.weight".into(), vec![HIDDEN]));
    tensors
}

/// Writes a shard of bf16 weights.
fn shard(path: &Path, tensors: &Tensors) -> usize {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * 2;
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(bf16::from_f32(0.01).to_le_bytes().repeat(end / 2));
    std::fs::write(path, bytes).unwrap();
    end
}

/// A model in two shards: 64 MiB of embeddings, and a layer of 56 MiB.
fn write_model(directory: &Path) {
    let shards = [
        ("model-00001-of-00002.safetensors", vec![(EMBEDDINGS.into(), vec![VOCAB, HIDDEN])]),
        ("model-00002-of-00002.safetensors", layer()),
    ];
    let mut weight_map = Map::new();
    for (file, tensors) in &shards {
        let size = shard(&directory.join(file), tensors);
        assert!(size <= LARGEST);
        weight_map.extend(tensors.iter().map(|(name, _)| (name.clone(), (*file).into())));
    }
    let index = json!({ "weight_map": weight_map });
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": VOCAB,
        "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 8,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": true,
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
}

const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Runs `work` on the model in a process of its own, started as `test`; the bytes by which the peak
/// of its memory rose. `None` in that process.
fn peak(test: &str, work: impl FnOnce(&Path)) -> Option<usize> {
    if let Some(directory) = std::env::var_os(MEASURE) {
        // Threads and their stacks are there before the clock starts.
        rayon::broadcast(|_| ());
        let before = status("VmRSS");
        work(directory.as_ref());
        println!("peak={}", status("VmHWM").saturating_sub(before));
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MEASURE, directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let rest = text.split("peak=").nth(1).unwrap_or_else(|| panic!("no peak in {text}"));
    Some(rest.split_whitespace().next().unwrap().parse().unwrap())
}

/// As for a device with memory of its own, which takes each tensor as it comes.
#[test]
fn does_reading_take_little_more_than_the_largest_shard() {
    let work = |directory: &Path| {
        let checkpoint = Checkpoint::open(directory).unwrap();
        for (name, shape) in checkpoint.expected_tensors() {
            let data = checkpoint.finite_data(&name, &shape, DType::BF16).unwrap();
            assert_eq!(data.num_elements(), shape.iter().product::<usize>());
        }
    };
    let test = "does_reading_take_little_more_than_the_largest_shard";
    let Some(peak) = peak(test, work) else { return };
    eprintln!("{} MiB for a largest shard of {} MiB", peak / MIB, LARGEST / MIB);
    assert!(peak <= LARGEST * 6 / 5, "{peak} bytes for a largest shard of {LARGEST}");
    assert!(peak >= LARGEST, "the largest tensor wasn't read");
}

/// Flex keeps the weights in host memory: 120 MiB here. Beside them there is less than a fifth of
/// the largest shard.
#[test]
fn does_loading_on_the_host_take_little_more_than_the_weights() {
    let work = |directory: &Path| {
        let checkpoint = Checkpoint::open(directory).unwrap();
        Llama::load(&checkpoint, DType::BF16, &Device::flex(), &mut |_, _| {}).unwrap();
    };
    let test = "does_loading_on_the_host_take_little_more_than_the_weights";
    let Some(peak) = peak(test, work) else { return };
    let weights = 120 * MIB;
    eprintln!("{} MiB for weights of {} MiB", peak / MIB, weights / MIB);
    assert!(peak <= weights + LARGEST / 5, "{peak} bytes for weights of {weights}");
    assert!(peak >= weights, "the weights weren't loaded");
}
