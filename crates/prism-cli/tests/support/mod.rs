//! The program, and a tiny model for it.

use std::path::Path;
use std::process::Command;

/// Whether the program ended well, what it printed, and what it said of errors.
pub fn prism(args: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_prism")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// A tiny model with random weights and a text for it, in a folder that lives as long as the first
/// of these.
pub fn tiny_model() -> (tempfile::TempDir, String, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let tiny = root.join("fixtures/models/tiny-llama31");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny.join(file), model.join(file)).unwrap();
    }
    // 512 word tokens, one a byte pair of hex digits, so that any text of such words encodes.
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..512).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let text: Vec<String> = (0..400).map(|i| format!("w{}", i * i % 511)).collect();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, text.join(" ")).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let (model, file) = (path(&model), path(&file));
    (folder, model, file)
}
