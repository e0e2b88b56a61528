//! Memory of a prompt, known before anything is loaded.

use prism_core::{AttentionShape, BlockGrid, Cost, PrismError};

use crate::config::ModelConfig;
use crate::names;

/// Bytes that a prompt of one sequence takes with Prism, by what they hold. Activations of the linear
/// layers come on top; they grow with the chunk, not with the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Every tensor of the model.
    pub weights: u64,
    /// Keys and values of all layers; dense attention has the same.
    pub kv_cache: u64,
    /// Block means of the keys of all layers, in f32, kept beside the cache.
    pub pooled_keys: u64,
    /// Block means of the queries of one layer, in f32, for the time of its attention.
    pub pooled_queries: u64,
    /// Which blocks are read: words and counts of one layer, for the time of its attention.
    pub selection: u64,
}

impl Memory {
    /// Memory of a whole prompt of `tokens` in blocks of `block`; weights and cache have elements of
    /// `element_bytes`.
    ///
    /// # Errors
    /// A block size of 0 or beyond the limit, or more tokens than indices can hold.
    pub fn of(
        config: &ModelConfig,
        tokens: usize,
        block: usize,
        element_bytes: usize,
    ) -> Result<Self, PrismError> {
        let ModelConfig { layers, q_heads, kv_heads, head_dim, .. } = *config;
        let kv = [1, kv_heads, tokens, head_dim];
        let shape = AttentionShape::new([1, q_heads, tokens, head_dim], kv, kv)?;
        let grid = BlockGrid::new(block, tokens, tokens)?;
        let cost = Cost::estimate(&shape, &[grid], 1.0, element_bytes);
        // Queries and keys have equally many blocks here.
        let pooled = |heads: usize| cost.pooled_bytes * heads as u64 / (q_heads + kv_heads) as u64;
        let elements = |shape: &[usize]| shape.iter().map(|&n| n as u64).product::<u64>();
        let parameters: u64 =
            names::expected(config).iter().map(|(_, shape)| elements(shape)).sum();
        Ok(Self {
            weights: parameters * element_bytes as u64,
            kv_cache: 2 * layers as u64 * elements(&kv) * element_bytes as u64,
            pooled_keys: layers as u64 * pooled(kv_heads),
            pooled_queries: pooled(q_heads),
            selection: cost.selection_bytes,
        })
    }

    /// What dense attention doesn't need.
    pub fn extra(&self) -> u64 {
        self.pooled_keys + self.pooled_queries + self.selection
    }
}

/// The table of `docs/models.md` in Markdown: bf16, blocks of 128.
///
/// # Errors
/// As [`Memory::of`].
pub fn memory_table(
    models: &[(&str, ModelConfig)],
    tokens: &[usize],
) -> Result<String, PrismError> {
    let mut table = String::from(
        "| model | tokens | weights | KV cache | pooled keys | pooled queries, a layer | selection, a layer | Prism's extra |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64);
    let mib = |bytes: u64| format!("{:.2} MiB", bytes as f64 / (1u64 << 20) as f64);
    for (name, config) in models {
        for &tokens in tokens {
            let memory = Memory::of(config, tokens, 128, 2)?;
            let share = 100.0 * memory.extra() as f64 / (memory.weights + memory.kv_cache) as f64;
            table += &format!(
                "| {name} | {}K | {} | {} | {} | {} | {} | {share:.2} % |\n",
                tokens / 1024,
                gib(memory.weights),
                gib(memory.kv_cache),
                mib(memory.pooled_keys),
                mib(memory.pooled_queries),
                mib(memory.selection),
            );
        }
    }
    Ok(table)
}
