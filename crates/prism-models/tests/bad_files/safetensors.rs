//! Malformed safetensors containers, and directories whose weights do not match.

use burn::tensor::DType;
use prism_models::safetensors_file::{SafetensorsError, SafetensorsFile};
use prism_models::{Checkpoint, LoadError};
use safetensors::SafeTensorError;
use safetensors::tensor::Dtype;
use tempfile::TempDir;

use crate::support::{file, safetensors};

fn open(bytes: &[u8]) -> Result<SafetensorsFile, LoadError> {
    SafetensorsFile::open(&file("model.safetensors", bytes).path)
}

/// The error of a file that must be refused.
fn refusal(bytes: &[u8]) -> SafetensorsError {
    match open(bytes).unwrap_err() {
        LoadError::Safetensors { source, .. } => source,
        other => panic!("{other}"),
    }
}

/// A file of one tensor `a`, with this many bytes of data.
fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    let tensor = format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#);
    safetensors(&format!(r#"{{"a":{tensor}}}"#), data)
}

#[test]
fn is_an_empty_file_refused() {
    assert!(matches!(open(b""), Err(LoadError::EmptyFile { .. })));
}

#[test]
fn are_seven_bytes_refused() {
    assert!(matches!(refusal(&[0; 7]), SafetensorsError::TooShort { got: 7 }));
}

#[test]
fn is_a_header_length_of_u64_max_refused() {
    let error = refusal(&u64::MAX.to_le_bytes());
    assert!(matches!(error, SafetensorsError::HeaderTooLarge { got: u64::MAX, .. }));
}

#[test]
fn is_a_header_of_more_than_100_megabytes_refused() {
    let error = refusal(&100_000_001u64.to_le_bytes());
    let limit = 100_000_000;
    assert!(matches!(error, SafetensorsError::HeaderTooLarge { limit: l, .. } if l == limit));
}

#[test]
fn is_a_header_longer_than_the_file_refused() {
    let error = refusal(&[&50u64.to_le_bytes()[..], b"{}"].concat());
    assert!(matches!(error, SafetensorsError::HeaderPastEnd { limit: 2, got: 50 }));
}

#[test]
fn is_a_header_that_is_not_utf8_refused() {
    let error = refusal(&[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat());
    assert!(matches!(error, SafetensorsError::NotUtf8(_)));
}

#[test]
fn is_a_header_that_is_not_json_refused() {
    for header in ["{", "[]", "nonsense", r#"{"a":1}"#, r#"{"a":{"dtype":"F32"}}"#] {
        let error = refusal(&safetensors(header, 0));
        assert!(matches!(error, SafetensorsError::BadHeader(_)), "{header}");
    }
}

#[test]
fn is_a_header_nested_deeper_than_the_stack_refused() {
    let header = format!(r#"{{"__metadata__":{}"#, "[".repeat(1_000_000));
    assert!(matches!(refusal(&safetensors(&header, 0)), SafetensorsError::BadHeader(_)));
}

#[test]
fn is_a_duplicate_name_refused() {
    let tensor = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let error = refusal(&safetensors(&format!("{{{tensor},{tensor}}}"), 1));
    assert!(matches!(&error, SafetensorsError::BadHeader(_)));
    assert!(error.to_string().contains("`a` occurs twice"));
}

#[test]
fn are_overlapping_and_gapped_offsets_refused() {
    for start in [1, 3] {
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}},
                "b":{{"dtype":"U8","shape":[2],"data_offsets":[{start},{}]}}}}"#,
            start + 2
        );
        let error = refusal(&safetensors(&header, start + 2));
        let bad = |name: &str| name == "b";
        assert!(matches!(
            error,
            SafetensorsError::BadLayout(SafeTensorError::InvalidOffset(name)) if bad(&name)
        ));
    }
}

#[test]
fn is_a_backward_offset_refused() {
    let error = refusal(&one("U8", "[1]", "[1,0]", 1));
    assert!(matches!(error, SafetensorsError::BadLayout(SafeTensorError::InvalidOffset(_))));
}

#[test]
fn is_an_end_near_u64_max_refused() {
    let error = refusal(&one("U8", "[18446744073709551615]", "[0,18446744073709551615]", 1));
    assert!(matches!(error, SafetensorsError::PastEnd { limit: 1, got: u64::MAX, .. }));
}

#[test]
fn is_a_shape_whose_product_overflows_refused() {
    let error = refusal(&one("F32", "[4294967296,4294967296]", "[0,4]", 4));
    assert!(matches!(error, SafetensorsError::BadLayout(SafeTensorError::ValidationOverflow)));
}

#[test]
fn is_a_size_other_than_shape_times_dtype_refused() {
    let error = refusal(&one("F32", "[2]", "[0,4]", 4));
    assert!(matches!(error, SafetensorsError::BadLayout(SafeTensorError::TensorInvalidInfo)));
}

#[test]
fn are_trailing_bytes_refused() {
    let error = refusal(&one("F32", "[1]", "[0,4]", 5));
    let expected = SafeTensorError::MetadataIncompleteBuffer.to_string();
    assert!(matches!(&error, SafetensorsError::BadLayout(_)));
    assert_eq!(error.to_string(), expected);
}

#[test]
fn is_truncated_data_refused() {
    let error = refusal(&one("F32", "[1]", "[0,4]", 3));
    assert!(matches!(error, SafetensorsError::PastEnd { limit: 3, got: 4, .. }));
}

#[test]
fn is_an_unknown_dtype_refused() {
    let error = refusal(&one("F31", "[1]", "[0,4]", 4));
    let bad =
        |error: &SafeTensorError| matches!(error, SafeTensorError::InvalidHeaderDeserialization(_));
    assert!(matches!(&error, SafetensorsError::BadLayout(error) if bad(error)));
}

#[test]
fn is_a_dtype_that_is_no_float_refused_on_conversion() {
    let file = open(&one("I64", "[1]", "[0,8]", 8)).unwrap();
    let LoadError::Safetensors { source, .. } = file.values::<f32>("a").unwrap_err() else {
        panic!()
    };
    assert!(matches!(source, SafetensorsError::UnsupportedDtype { got: Dtype::I64, .. }));
}

#[test]
fn is_a_git_lfs_pointer_recognised() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    assert!(matches!(open(pointer), Err(LoadError::LfsPointer { .. })));
}

/// A directory with a small model whose weights are the two given tensors.
fn model(embeddings: [u64; 2], value: f32) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let [rows, columns] = embeddings;
    let size = rows * columns * 4;
    let header = format!(
        r#"{{"model.embed_tokens.weight":
            {{"dtype":"F32","shape":[{rows},{columns}],"data_offsets":[0,{size}]}},
            "extra":{{"dtype":"U8","shape":[1],"data_offsets":[{size},{}]}}}}"#,
        size + 1
    );
    let mut bytes = safetensors(&header, size as usize + 1);
    let start = bytes.len() - size as usize - 1;
    bytes[start + 4..start + 8].copy_from_slice(&value.to_le_bytes());
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    let config = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":4,"intermediate_size":4,
        "num_hidden_layers":1,"num_attention_heads":1,"vocab_size":3,"rms_norm_eps":1e-5,
        "max_position_embeddings":16,"tie_word_embeddings":true}"#;
    std::fs::write(directory.path().join("config.json"), config).unwrap();
    directory
}

const EMBEDDINGS: &str = "model.embed_tokens.weight";

#[test]
fn are_missing_and_extra_tensors_listed() {
    let directory = model([3, 4], 1.0);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let audit = checkpoint.audit();
    assert_eq!(audit.unexpected, ["extra"]);
    assert!(audit.missing.contains(&"model.norm.weight".to_owned()));
    assert!(!audit.missing.contains(&"lm_head.weight".to_owned()));
    assert_eq!(checkpoint.finite_f32_tensor(EMBEDDINGS, &[3, 4]).unwrap()[..2], [0.0, 1.0]);
    let error = checkpoint.f32_tensor("model.norm.weight", &[4]).unwrap_err();
    assert!(matches!(error, LoadError::MissingTensor { name } if name == "model.norm.weight"));
}

#[test]
fn is_a_wrong_shape_refused() {
    let directory = model([4, 4], 1.0);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let LoadError::WrongShape { expected, got, .. } =
        checkpoint.f32_tensor(EMBEDDINGS, &[3, 4]).unwrap_err()
    else {
        panic!()
    };
    assert_eq!((expected, got), (vec![3, 4], vec![4, 4]));
}

#[test]
fn are_nan_weights_refused_on_request() {
    let directory = model([3, 4], f32::NAN);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert!(checkpoint.f32_tensor(EMBEDDINGS, &[3, 4]).unwrap()[1].is_nan());
    let error = checkpoint.finite_f32_tensor(EMBEDDINGS, &[3, 4]).unwrap_err();
    assert!(matches!(error, LoadError::NonFiniteWeight { index: 1, .. }));
}

#[test]
fn are_weights_too_large_for_the_type_refused() {
    let directory = model([3, 4], 70_000.0);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        assert_eq!(checkpoint.finite_data(EMBEDDINGS, &[3, 4], dtype).unwrap().dtype(), dtype);
    }
    let error = checkpoint.finite_data(EMBEDDINGS, &[3, 4], DType::F16).unwrap_err();
    let message =
        "tensor `model.embed_tokens.weight` holds 70000 at flat index 1; F16 ends at 65504";
    assert_eq!(error.to_string(), message);
    let error = checkpoint.finite_data(EMBEDDINGS, &[3, 4], DType::F64).unwrap_err();
    assert!(matches!(error, LoadError::WeightType { got: DType::F64 }));
}

#[test]
fn are_ranks_and_metadata_beyond_reason_refused() {
    let error = refusal(&one("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]", 1));
    assert!(error.to_string().contains("at most 8 elements"), "{error}");
    let metadata = (0..1025).map(|i| format!(r#""{i}":"""#)).collect::<Vec<_>>().join(",");
    let error = refusal(&safetensors(&format!(r#"{{"__metadata__":{{{metadata}}}}}"#), 0));
    assert!(error.to_string().contains("at most 1024 elements"), "{error}");
}

#[test]
fn is_a_directory_without_weights_or_configuration_refused() {
    let directory = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::MissingFile { name: "model.safetensors", .. }));
    std::fs::write(directory.path().join("model.safetensors"), safetensors("{}", 0)).unwrap();
    let error = Checkpoint::open(directory.path()).unwrap_err();
    assert!(matches!(error, LoadError::MissingFile { name: "config.json", .. }));
}
