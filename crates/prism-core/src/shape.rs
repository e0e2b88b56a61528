//! The shape of one attention problem and the lengths of its sequences.

use crate::error::{PrismError, Result};

/// Shape of one attention call: Q is `[batch, q_heads, q_len, head_dim]`,
/// K and V are `[batch, kv_heads, kv_len, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Sequences in the batch.
    pub batch: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key/value heads; divides `q_heads`.
    pub kv_heads: usize,
    /// Queries a sequence (the longest one of a ragged batch).
    pub q_len: usize,
    /// Keys a sequence (the longest one of a ragged batch).
    pub kv_len: usize,
    /// Elements of a head, of Q, K and V alike.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Checks the shapes of Q, K and V against each other.
    ///
    /// Lengths of 0 are allowed: no queries give an empty output, no keys give zeros (LSE −∞).
    ///
    /// # Errors
    /// A zero batch, head count or head_dim; dimensions that differ; query heads that are not a
    /// multiple of kv heads; more elements than fit `isize`.
    pub fn new(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Result<Self> {
        let [batch, q_heads, q_len, head_dim] = q;
        let [k_batch, kv_heads, kv_len, k_dim] = k;
        let [v_batch, v_heads, v_len, v_dim] = v;
        for (name, len) in [
            ("batch", batch),
            ("query heads", q_heads),
            ("kv heads", kv_heads),
            ("head_dim", head_dim),
        ] {
            if len == 0 {
                return Err(PrismError::ZeroDim { name });
            }
        }
        same("batch", ("q", batch), ("k", k_batch))?;
        same("batch", ("q", batch), ("v", v_batch))?;
        same("head_dim", ("q", head_dim), ("k", k_dim))?;
        same("head_dim", ("q", head_dim), ("v", v_dim))?;
        same("heads", ("k", kv_heads), ("v", v_heads))?;
        same("length", ("k", kv_len), ("v", v_len))?;
        if !q_heads.is_multiple_of(kv_heads) {
            return Err(PrismError::HeadGroups { q_heads, kv_heads });
        }
        for dims in [q, k] {
            dims.iter()
                .try_fold(1usize, |product, &len| product.checked_mul(len))
                .filter(|&elements| elements <= isize::MAX as usize / 8)
                .ok_or(PrismError::TooLarge {
                    what: "the number of elements",
                    limit: isize::MAX as u64 / 8,
                })?;
        }
        Ok(Self { batch, q_heads, kv_heads, q_len, kv_len, head_dim })
    }

    /// Query heads that share one kv head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }
}

fn same(
    name: &'static str,
    (left, left_len): (&'static str, usize),
    (right, right_len): (&'static str, usize),
) -> Result<()> {
    if left_len == right_len {
        Ok(())
    } else {
        Err(PrismError::DimMismatch { name, left, left_len, right, right_len })
    }
}

/// Lengths of the sequences of a right-padded batch, one entry a sequence.
///
/// Sequence `b` owns the first `q[b]` queries and the first `kv[b]` keys; what lies behind is
/// padding: never read, and its output rows are 0 with LSE −∞.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SequenceLengths {
    q: Vec<usize>,
    kv: Vec<usize>,
}

impl SequenceLengths {
    /// Lengths of queries and keys, one entry a sequence.
    pub fn new(q: Vec<usize>, kv: Vec<usize>) -> Self {
        Self { q, kv }
    }

    /// A prefill from an empty cache: as many queries as keys.
    pub fn prefill(lengths: Vec<usize>) -> Self {
        Self { q: lengths.clone(), kv: lengths }
    }

    /// From cumulative lengths `[0, a, a + b, …]` as variable-length kernels take them.
    ///
    /// # Errors
    /// Empty, not starting at 0, or decreasing offsets.
    pub fn from_cumulative(q: &[usize], kv: &[usize]) -> Result<Self> {
        let lengths = |name: &str, offsets: &[usize]| -> Result<Vec<usize>> {
            let first = offsets.first();
            if first != Some(&0) {
                let got = first.map_or("none".into(), usize::to_string);
                let reason = format!("cumulative {name} lengths must start with 0, got {got}");
                return Err(PrismError::Lengths { reason });
            }
            offsets
                .windows(2)
                .map(|pair| {
                    pair[1].checked_sub(pair[0]).ok_or_else(|| PrismError::Lengths {
                        reason: format!(
                            "cumulative {name} lengths must not decrease, got {} after {}",
                            pair[1], pair[0]
                        ),
                    })
                })
                .collect()
        };
        Ok(Self { q: lengths("query", q)?, kv: lengths("key", kv)? })
    }

    /// Checks the lengths against the tensors they describe and returns `(q_len, kv_len)` of each
    /// sequence; without lengths every sequence is as long as the tensors.
    ///
    /// # Errors
    /// Another number of entries than sequences, or an entry longer than its tensor.
    pub fn resolve(lengths: Option<&Self>, shape: &AttentionShape) -> Result<Vec<(usize, usize)>> {
        let Some(lengths) = lengths else {
            return Ok(vec![(shape.q_len, shape.kv_len); shape.batch]);
        };
        for (name, list, limit) in
            [("query", &lengths.q, shape.q_len), ("key", &lengths.kv, shape.kv_len)]
        {
            if list.len() != shape.batch {
                let reason = format!(
                    "expected one {name} length for each of {} sequences, got {}",
                    shape.batch,
                    list.len()
                );
                return Err(PrismError::Lengths { reason });
            }
            if let Some((b, len)) = list.iter().enumerate().find(|&(_, &len)| len > limit) {
                let reason = format!(
                    "{name} length of sequence {b} is {len}, but the tensor holds only {limit}"
                );
                return Err(PrismError::Lengths { reason });
            }
        }
        Ok(lengths.q.iter().copied().zip(lengths.kv.iter().copied()).collect())
    }
}
