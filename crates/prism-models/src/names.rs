//! The canonical names and shapes of a model's tensors.
//!
//! The names are those of Hugging Face. GGUF files have shorter ones, and store the rows of the
//! query and key projections in another order, which [`from_gguf`] reports.

use crate::config::{Architecture, ModelConfig};

/// Order of a tensor's rows within each head, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// The canonical order: the channels of a rotated pair lie half a head apart.
    Halves,
    /// Queries with the channels of a rotated pair next to each other.
    InterleavedQ,
    /// Keys with the channels of a rotated pair next to each other.
    InterleavedK,
}

/// The canonical name of a tensor of a GGUF file of an architecture, and the order of its rows;
/// `None` for a name that no such file has. Only files of Llama have rows in another order.
pub fn from_gguf(name: &str, architecture: Architecture) -> Option<(String, RowOrder)> {
    let plain = |name: &str| Some((name.to_owned(), RowOrder::Halves));
    match name {
        "token_embd.weight" => return plain("model.embed_tokens.weight"),
        "output_norm.weight" => return plain("model.norm.weight"),
        "output.weight" => return plain("lm_head.weight"),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    // A canonical number only: `blk.01.` must not become a second layer 1.
    let layer = layer.parse::<usize>().ok().filter(|number| number.to_string() == layer)?;
    let (part, kind) = part.rsplit_once('.')?;
    let (part, order) = match (part, kind) {
        ("attn_norm", "weight") => ("input_layernorm", RowOrder::Halves),
        ("ffn_norm", "weight") => ("post_attention_layernorm", RowOrder::Halves),
        ("ffn_gate", "weight") => ("mlp.gate_proj", RowOrder::Halves),
        ("ffn_up", "weight") => ("mlp.up_proj", RowOrder::Halves),
        ("ffn_down", "weight") => ("mlp.down_proj", RowOrder::Halves),
        ("attn_q", "weight" | "bias") => ("self_attn.q_proj", RowOrder::InterleavedQ),
        ("attn_k", "weight" | "bias") => ("self_attn.k_proj", RowOrder::InterleavedK),
        ("attn_q_norm", "weight") => ("self_attn.q_norm", RowOrder::Halves),
        ("attn_k_norm", "weight") => ("self_attn.k_norm", RowOrder::Halves),
        ("attn_v", "weight" | "bias") => ("self_attn.v_proj", RowOrder::Halves),
        ("attn_output", "weight" | "bias") => ("self_attn.o_proj", RowOrder::Halves),
        _ => return None,
    };
    let order = if architecture == Architecture::Llama { order } else { RowOrder::Halves };
    Some((format!("model.layers.{layer}.{part}.{kind}"), order))
}

/// The names and row-major shapes of all tensors that a model of this configuration has.
pub fn expected(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let inner = config.intermediate_size;
    let (q, kv) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !config.tie_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
    }
    for layer in 0..config.layers {
        let mut push = |part: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{part}"), shape.to_vec()));
        };
        push("input_layernorm.weight", &[hidden]);
        push("post_attention_layernorm.weight", &[hidden]);
        for (projection, rows, columns, biased) in [
            ("q", q, hidden, config.qkv_bias),
            ("k", kv, hidden, config.qkv_bias),
            ("v", kv, hidden, config.qkv_bias),
            ("o", hidden, q, config.output_bias),
        ] {
            push(&format!("self_attn.{projection}_proj.weight"), &[rows, columns]);
            if biased {
                push(&format!("self_attn.{projection}_proj.bias"), &[rows]);
            }
        }
        if config.qk_norm {
            push("self_attn.q_norm.weight", &[config.head_dim]);
            push("self_attn.k_norm.weight", &[config.head_dim]);
        }
        push("mlp.gate_proj.weight", &[inner, hidden]);
        push("mlp.up_proj.weight", &[inner, hidden]);
        push("mlp.down_proj.weight", &[hidden, inner]);
    }
    tensors
}

/// Puts rows that lie as interleaved pairs back into halves, head by head.
///
/// Within a head of `d` rows, row `2i` goes to `i` and row `2i + 1` to `i + d/2`. `values` must
/// hold `heads * head_dim` rows of equal length.
pub(crate) fn halves_from_interleaved(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let columns = values.len() / (heads * head_dim);
    let half = head_dim / 2;
    let mut reordered = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for row in 0..head_dim {
            let source = if row < half { 2 * row } else { 2 * (row - half) + 1 };
            reordered.extend_from_slice(&head[source * columns..][..columns]);
        }
    }
    reordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn do_gguf_names_become_hugging_face_names() {
        let name = |gguf| from_gguf(gguf, Architecture::Llama).map(|(name, _)| name);
        assert_eq!(name("token_embd.weight").unwrap(), "model.embed_tokens.weight");
        assert_eq!(name("blk.12.ffn_down.weight").unwrap(), "model.layers.12.mlp.down_proj.weight");
        assert_eq!(
            from_gguf("blk.0.attn_k.weight", Architecture::Llama),
            Some(("model.layers.0.self_attn.k_proj.weight".into(), RowOrder::InterleavedK))
        );
        assert_eq!(
            from_gguf("blk.0.attn_k.bias", Architecture::Qwen2),
            Some(("model.layers.0.self_attn.k_proj.bias".into(), RowOrder::Halves))
        );
        assert_eq!(
            name("blk.7.attn_q_norm.weight").unwrap(),
            "model.layers.7.self_attn.q_norm.weight"
        );
        for foreign in ["blk.00.attn_q.weight", "blk.x.attn_q.weight", "blk.0.ffn_up.bias", "x"] {
            assert_eq!(name(foreign), None);
        }
    }

    #[test]
    fn is_the_interleaving_of_rows_undone_within_each_head() {
        // What a converter does to Hugging Face rows: within a head, [2, d/2] becomes [d/2, 2].
        let (heads, dim, columns) = (3, 8, 2);
        let original = (0..heads * dim * columns).map(|x| x as f32).collect::<Vec<_>>();
        let mut stored = vec![0.0; original.len()];
        for head in 0..heads {
            for half in 0..2 {
                for pair in 0..dim / 2 {
                    let from = (head * dim + half * dim / 2 + pair) * columns;
                    let to = (head * dim + 2 * pair + half) * columns;
                    stored[to..to + columns].copy_from_slice(&original[from..from + columns]);
                }
            }
        }
        assert_eq!(stored[..6], [0.0, 1.0, 8.0, 9.0, 2.0, 3.0]);
        assert_eq!(halves_from_interleaved(&stored, heads, dim), original);
    }
}
