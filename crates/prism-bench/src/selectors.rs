//! What choosing blocks takes, by each method, on any of Burn's devices: time, memory, and the share of
//! the blocks that it chooses.
//!
//! The time is the host's, of back-to-back calls that are waited for together: methods are many small
//! operations, and what a caller waits for counts, gaps included.

use std::time::Instant;

use anyhow::{Result, ensure};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_prism::{
    AttentionOptions, AttentionShape, PrismConfig, SelectedBlocks, plan, select_blocks,
};

use crate::{Budget, Log, Record};

/// Windows whose median counts.
const WINDOWS: usize = 3;
/// The most calls in a window.
const CALLS: usize = 100;
/// The most calls by themselves before.
const WARM: usize = 4;

/// A method under the name that records give it.
#[derive(Debug, Clone)]
pub struct Method {
    /// The name.
    pub name: String,
    /// The method, and the layer's settings.
    pub config: PrismConfig,
}

/// Sizes of Q and K.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub q_heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Element type of Q and K.
    pub dtype: DType,
}

/// Times methods on random Q and K of these lengths, the shortest first; a method that took longer than
/// `budget.slowest` isn't tried on longer ones.
///
/// # Errors
/// Settings that don't fit, and those of the log.
pub fn time(
    device: &Device,
    heads: Heads,
    lengths: &[usize],
    methods: &[Method],
    budget: &Budget,
    log: &mut Log,
) -> Result<()> {
    budget.check(&[], &[])?;
    ensure!(!lengths.is_empty(), "lengths must name at least one");
    ensure!(!lengths.contains(&0), "length must be at least 1, got 0");
    let mut lengths = lengths.to_vec();
    lengths.sort_unstable();
    lengths.dedup();
    let (start, mut slow) = (Instant::now(), vec![None; methods.len()]);
    for len in lengths {
        let random = |heads_of| {
            let dims = [1, heads_of, len, heads.head_dim];
            Tensor::<4>::random(dims, Distribution::Normal(0.0, 1.0), (device, heads.dtype))
        };
        let (q, k) = (random(heads.q_heads), random(heads.kv_heads));
        for (method, slow) in methods.iter().zip(&mut slow) {
            let skipped = match *slow {
                Some(ms) => Some(format!("{ms:.0} ms for fewer")),
                None if start.elapsed().as_secs_f64() > budget.seconds => {
                    Some("no time left".into())
                }
                None => None,
            };
            if let Some(why) = skipped {
                log.note(format!("{} of {len} tokens skipped: {why}", method.name))?;
                continue;
            }
            let record = measure(device, heads, (&q, &k), method, budget)?;
            if record.ms > budget.slowest {
                *slow = Some(record.ms);
            }
            log.record(record)?;
        }
    }
    Ok(())
}

fn measure(
    device: &Device,
    heads: Heads,
    (q, k): (&Tensor<4>, &Tensor<4>),
    method: &Method,
    budget: &Budget,
) -> Result<Record> {
    let select = || -> Result<SelectedBlocks> {
        let options = AttentionOptions::default();
        Ok(select_blocks(q.clone(), k.clone(), &method.config, &options)?)
    };
    let wait = || device.sync().map_err(|error| anyhow::anyhow!("the device failed: {error:?}"));
    let density = select()?.density()?;
    wait()?;
    let calls = |count: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            std::hint::black_box(select()?);
        }
        wait()?;
        Ok(start.elapsed().as_secs_f64() * 1e3 / count as f64)
    };
    // Kernels are compiled by the first calls, fused ones not by the very first: until they get no quicker.
    let mut once = calls(1)?;
    for _ in 1..WARM {
        let again = calls(1)?;
        let settled = again > once / 2.0;
        once = once.min(again);
        if settled {
            break;
        }
    }
    let mut times = vec![once];
    if once < budget.slowest {
        let count = ((budget.window / once) as usize).clamp(1, CALLS);
        times = (0..WINDOWS).map(|_| calls(count)).collect::<Result<_>>()?;
        times.sort_by(f64::total_cmp);
    }
    let dtype = format!("{:?}", heads.dtype).to_lowercase();
    let [_, _, len, _] = q.dims();
    let memory = memory(device, heads, len, method)? as f64 / f64::from(1 << 20);
    Ok(Record {
        what: "choose".into(),
        rung: method.name.clone(),
        dtype,
        batch: 1,
        q_heads: heads.q_heads,
        kv_heads: heads.kv_heads,
        q_len: len,
        kv_len: len,
        head_dim: heads.head_dim,
        density,
        ms: times[times.len() / 2],
        ms_burst: None,
        tflops: None,
        gbps: None,
        peer: false,
        note: format!("memory {memory:.1} MiB"),
    })
}

/// Bytes of all that is made to choose blocks, the selection with it, as [`plan`] counts them. Burn's
/// allocator takes pages ahead, so that what it holds says little.
fn memory(device: &Device, heads: Heads, len: usize, method: &Method) -> Result<u64> {
    let Heads { q_heads, kv_heads, head_dim, dtype } = heads;
    let kv = [1, kv_heads, len, head_dim];
    let shape = AttentionShape::new([1, q_heads, len, head_dim], kv, kv)?;
    let bytes = |dense_below| -> Result<u64> {
        let config = method.config.clone().with_dense_below(dense_below);
        Ok(plan(&config, &shape, None, dtype, device)?.bytes)
    };
    // Exact attention makes its output alone.
    Ok(bytes(0)?.saturating_sub(bytes(usize::MAX)?))
}
