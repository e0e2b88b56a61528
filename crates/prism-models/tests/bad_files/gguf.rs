//! Malformed GGUF containers.

use prism_models::gguf::{GgmlType, GgufError, GgufFile};
use prism_models::{Checkpoint, ConfigError, LoadError};

use crate::support::{Gguf, file};

fn open(bytes: &[u8]) -> Result<GgufFile, LoadError> {
    GgufFile::open(&file("model.gguf", bytes).path)
}

/// The error of a file that must be refused.
fn refusal(bytes: &[u8]) -> GgufError {
    match open(bytes).unwrap_err() {
        LoadError::Gguf { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn is_a_small_valid_file_read() {
    let mut bytes = Gguf::new().tensor("t", &[2, 3], 0, 0).u32("x", 7).bytes();
    let data = bytes.len() - 256;
    bytes[data..data + 4].copy_from_slice(&1.5f32.to_le_bytes());
    let file = open(&bytes).unwrap();
    assert_eq!(file.metadata().get_u32("x"), Ok(7));
    assert_eq!(file.tensor_names().collect::<Vec<_>>(), ["t"]);
    let info = file.tensor_info("t").unwrap();
    assert_eq!((info.shape.as_slice(), info.kind), (&[3, 2][..], GgmlType::F32));
    assert_eq!(file.dequantise("t").unwrap(), [1.5, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert!(matches!(file.dequantise("u"), Err(LoadError::MissingTensor { .. })));
}

#[test]
fn is_a_bad_magic_refused() {
    let mut gguf = Gguf::new();
    gguf.magic = *b"GGML";
    assert_eq!(refusal(&gguf.bytes()), GgufError::BadMagic { got: b"GGML".into() });
    assert_eq!(refusal(b"GG"), GgufError::BadMagic { got: b"GG".into() });
}

#[test]
fn is_an_unknown_version_refused() {
    for version in [0, 1, 4, u32::MAX] {
        let mut gguf = Gguf::new();
        gguf.version = version;
        assert_eq!(refusal(&gguf.bytes()), GgufError::UnsupportedVersion { got: version });
    }
}

#[test]
fn is_a_big_endian_file_refused() {
    let mut gguf = Gguf::new();
    gguf.version = 3u32.swap_bytes();
    assert_eq!(refusal(&gguf.bytes()), GgufError::BigEndian);
}

#[test]
fn is_every_truncation_of_a_header_refused() {
    let gguf = Gguf::new().str("key", "value").strings("list", &["a", "b"]);
    let header = gguf.tensor("tensor", &[32, 2], 8, 0).header();
    for length in 1..header.len() {
        assert!(matches!(open(&header[..length]), Err(LoadError::Gguf { .. })), "{length} bytes");
    }
}

#[test]
fn is_truncated_data_refused() {
    let bytes = Gguf::new().tensor("t", &[64], 0, 0).bytes();
    assert!(open(&bytes).is_ok());
    let error = refusal(&bytes[..bytes.len() - 1]);
    let expected = GgufError::PastEnd { name: "t".into(), offset: 0, bytes: 256, limit: 255 };
    assert_eq!(error, expected);
}

#[test]
fn are_more_than_four_dimensions_or_none_refused() {
    for rank in [0, 5] {
        let bytes = Gguf::new().tensor("t", &vec![1; rank], 0, 0).bytes();
        let got = rank as u32;
        assert_eq!(refusal(&bytes), GgufError::BadRank { name: "t".into(), limit: 4, got });
    }
}

#[test]
fn is_a_dimension_of_zero_refused() {
    let bytes = Gguf::new().tensor("t", &[4, 0], 0, 0).bytes();
    assert_eq!(refusal(&bytes), GgufError::ZeroDimension { name: "t".into() });
}

#[test]
fn is_a_product_that_overflows_refused() {
    for dimensions in [[1 << 32, 1 << 32], [u64::MAX, 1], [1 << 61, 2]] {
        let bytes = Gguf::new().tensor("t", &dimensions, 0, 0).bytes();
        let dimensions = dimensions.to_vec();
        assert_eq!(refusal(&bytes), GgufError::SizeOverflow { name: "t".into(), dimensions });
    }
}

#[test]
fn is_a_string_longer_than_the_file_refused() {
    for length in [1 << 60, u64::MAX, 1000] {
        let bytes = Gguf::new().pair("k", 8, &u64::to_le_bytes(length)).bytes();
        let error = refusal(&bytes);
        assert!(matches!(error, GgufError::Truncated { needed, .. } if needed == length));
    }
}

#[test]
fn are_counts_that_the_file_cannot_hold_refused() {
    let mut gguf = Gguf::new();
    gguf.tensor_count = Some(u64::MAX);
    let error = refusal(&gguf.bytes());
    assert!(matches!(error, GgufError::CountTooLarge { what: "tensor count", got: u64::MAX, .. }));

    let mut gguf = Gguf::new();
    gguf.pair_count = Some(1 << 50);
    let error = refusal(&gguf.bytes());
    assert!(matches!(error, GgufError::CountTooLarge { what: "metadata count", .. }));

    for kind in [0u32, 8, 12] {
        let array = [&kind.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        let error = refusal(&Gguf::new().pair("k", 9, &array).bytes());
        assert!(matches!(error, GgufError::CountTooLarge { what: "metadata array", .. }));
    }
}

#[test]
fn is_an_array_of_arrays_refused() {
    let array = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    let error = refusal(&Gguf::new().pair("k", 9, &array).bytes());
    assert_eq!(error, GgufError::NestedArray { key: "k".into() });
}

#[test]
fn is_an_unknown_value_type_refused() {
    let error = refusal(&Gguf::new().pair("k", 13, &[0; 8]).bytes());
    assert_eq!(error, GgufError::UnknownValueType { key: "k".into(), got: 13 });
}

#[test]
fn are_bad_booleans_and_strings_refused() {
    let error = refusal(&Gguf::new().pair("k", 7, &[2]).bytes());
    assert!(matches!(error, GgufError::BadBool { got: 2, .. }));
    let array = [&7u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 9]].concat();
    let error = refusal(&Gguf::new().pair("k", 9, &array).bytes());
    assert!(matches!(error, GgufError::BadBool { got: 9, .. }));
    let string = [&2u64.to_le_bytes()[..], &[0xc3, 0x28]].concat();
    let error = refusal(&Gguf::new().pair("k", 8, &string).bytes());
    assert!(matches!(error, GgufError::NotUtf8 { .. }));
}

#[test]
fn is_a_bad_alignment_refused() {
    for alignment in [0, 3, 24, 1 << 30] {
        let error = refusal(&Gguf::new().u32("general.alignment", alignment).bytes());
        assert_eq!(error, GgufError::BadAlignment { limit: 1 << 20, got: alignment.into() });
    }
    let error = refusal(&Gguf::new().str("general.alignment", "32").bytes());
    assert!(matches!(error, GgufError::Metadata(_)));
}

#[test]
fn is_an_unaligned_offset_refused() {
    let error = refusal(&Gguf::new().tensor("t", &[1], 0, 4).bytes());
    assert_eq!(error, GgufError::UnalignedOffset { name: "t".into(), alignment: 32, got: 4 });
}

#[test]
fn is_an_offset_past_the_end_refused() {
    for offset in [256, 1 << 40, u64::MAX - 31] {
        let error = refusal(&Gguf::new().tensor("t", &[1], 0, offset).bytes());
        let expected = GgufError::PastEnd { name: "t".into(), offset, bytes: 4, limit: 256 };
        assert_eq!(error, expected);
    }
}

#[test]
fn are_overlapping_tensors_refused() {
    let error = refusal(&Gguf::new().tensor("a", &[9], 0, 0).tensor("b", &[1], 0, 32).bytes());
    assert_eq!(error, GgufError::Overlap { first: "a".into(), second: "b".into() });
}

#[test]
fn are_duplicate_names_refused() {
    let error = refusal(&Gguf::new().tensor("a", &[1], 0, 0).tensor("a", &[1], 0, 32).bytes());
    assert_eq!(error, GgufError::DuplicateTensor { name: "a".into() });
    let error = refusal(&Gguf::new().u32("k", 1).u32("k", 1).bytes());
    assert_eq!(error, GgufError::DuplicateKey { key: "k".into() });
}

#[test]
fn is_an_unsupported_type_named() {
    for (kind, name) in [(10, "Q2_K"), (20, "IQ4_NL"), (24, "I8"), (999, "number 999")] {
        let error = refusal(&Gguf::new().tensor("t", &[256], kind, 0).bytes());
        assert_eq!(error, GgufError::UnsupportedType { name: "t".into(), got: name.into() });
        assert!(error.to_string().contains(name));
    }
}

#[test]
fn is_a_partial_block_refused() {
    for (kind, block) in [(2, 32), (8, 32), (12, 256), (14, 256)] {
        let error = refusal(&Gguf::new().tensor("t", &[31, 32], kind, 0).bytes());
        assert_eq!(error, GgufError::PartialBlock { name: "t".into(), block, got: 31 });
    }
}

/// A model of one head whose projections and embeddings are as small as can be.
fn model() -> Gguf {
    Gguf::new()
        .str("general.architecture", "llama")
        .u32("llama.embedding_length", 4)
        .u32("llama.feed_forward_length", 4)
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 16)
        .u32("llama.attention.head_count", 1)
        .u32("llama.vocab_size", 3)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .f32("llama.rope.freq_base", 10_000.0)
}

fn model_refusal(gguf: &Gguf) -> ConfigError {
    match Checkpoint::open(&file("model.gguf", &gguf.bytes()).path).unwrap_err() {
        LoadError::Config { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn are_missing_tensors_and_wrong_shapes_reported() {
    let gguf = model().tensor("blk.0.attn_q.weight", &[4, 4], 0, 0).tensor("odd", &[1], 0, 64);
    let file = file("model.gguf", &gguf.bytes());
    let checkpoint = Checkpoint::open(&file.path).unwrap();
    let audit = checkpoint.audit();
    assert_eq!(audit.unexpected, ["odd"]);
    assert!(audit.missing.contains(&"model.embed_tokens.weight".to_owned()));
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert!(checkpoint.f32_tensor(name, &[4, 4]).is_ok());
    let error = checkpoint.f32_tensor(name, &[2, 8]).unwrap_err();
    assert!(matches!(error, LoadError::WrongShape { got, .. } if got == [4, 4]));
}

#[test]
fn are_query_rows_put_into_halves() {
    let gguf = model().tensor("blk.0.attn_q.weight", &[4, 4], 0, 0);
    let mut bytes = gguf.bytes();
    let data = bytes.len() - 256;
    for i in 0..16 {
        bytes[data + 4 * i..][..4].copy_from_slice(&(i as f32).to_le_bytes());
    }
    let file = file("model.gguf", &bytes);
    let checkpoint = Checkpoint::open(&file.path).unwrap();
    let values = checkpoint.f32_tensor("model.layers.0.self_attn.q_proj.weight", &[4, 4]).unwrap();
    let rows = values.chunks(4).map(|row| row[0] as usize / 4).collect::<Vec<_>>();
    assert_eq!(rows, [0, 2, 1, 3]);
}

#[test]
fn is_another_architecture_refused() {
    let error = model_refusal(&Gguf::new().str("general.architecture", "qwen3moe"));
    assert!(matches!(&error, ConfigError::UnsupportedArchitecture { got } if got == "qwen3moe"));
    let message = "architecture qwen3moe is not supported; supported: llama, mistral, qwen2, qwen3";
    assert_eq!(error.to_string(), message);
}

#[test]
fn are_the_rows_of_qwen_left_in_their_order() {
    for (name, norms) in [("qwen2", false), ("qwen3", true)] {
        let key = |field: &str| format!("{name}.{field}");
        let gguf = Gguf::new()
            .str("general.architecture", name)
            .u32(&key("embedding_length"), 4)
            .u32(&key("feed_forward_length"), 4)
            .u32(&key("block_count"), 1)
            .u32(&key("context_length"), 16)
            .u32(&key("attention.head_count"), 1)
            .u32(&key("vocab_size"), 3)
            .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
            .tensor("blk.0.attn_q.weight", &[4, 4], 0, 0)
            .tensor("blk.0.attn_q.bias", &[4], 0, 64);
        let mut bytes = gguf.bytes();
        let data = bytes.len() - 256;
        for i in 0..16 {
            bytes[data + 4 * i..][..4].copy_from_slice(&(i as f32).to_le_bytes());
        }
        let file = file("model.gguf", &bytes);
        let checkpoint = Checkpoint::open(&file.path).unwrap();
        let query = "model.layers.0.self_attn.q_proj.weight";
        let values = checkpoint.f32_tensor(query, &[4, 4]).unwrap();
        assert!(values.into_iter().eq((0..16).map(|i| i as f32)));
        let config = checkpoint.config();
        assert_eq!((config.qkv_bias, config.output_bias, config.qk_norm), (true, false, norms));
        assert!(checkpoint.audit().unexpected.is_empty());
        let norm = "model.layers.0.self_attn.q_norm.weight".to_owned();
        assert_eq!(checkpoint.audit().missing.contains(&norm), norms);
    }
}

#[test]
fn are_missing_values_mixtures_and_unknown_scalings_refused() {
    let error = model_refusal(&Gguf::new().str("general.architecture", "llama"));
    assert!(matches!(error, ConfigError::Metadata(_)));
    for (key, value) in [
        ("llama.expert_count", 8.0),
        ("llama.attention.sliding_window", 4096.0),
        ("llama.attn_logit_softcapping", 50.0),
    ] {
        let error = model_refusal(&model().f32(key, value));
        assert!(matches!(error, ConfigError::UnsupportedMetadata { field, .. } if field == key));
    }
    let error = model_refusal(&model().str("llama.rope.scaling.type", "longrope"));
    assert!(matches!(error, ConfigError::UnsupportedRope { .. }));
    let error = model_refusal(&model().u32("llama.rope.dimension_count", 2));
    assert!(matches!(error, ConfigError::OutOfRange { .. }));
    let error = model_refusal(&model().u32("llama.attention.head_count_kv", 0));
    assert!(matches!(error, ConfigError::OutOfRange { .. }));
    let error = model_refusal(&model().tensor("rope_freqs.weight", &[2], 0, 0));
    assert!(matches!(error, ConfigError::Unsupported { field: "rope_freqs.weight", .. }));
}
