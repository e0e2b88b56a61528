//! `prism bench selectors`: what choosing blocks takes, by every method.

use anyhow::{Result, bail};
use prism_bench::selectors::{Heads, Method};
use prism_bench::{Budget, Log, selectors};
use prism_core::SelectorConfig;
use prism_eval::Attend;

use super::prefill::{dtype, sizes};
use crate::args::BenchSelectorsArgs;
use crate::device;

pub(super) fn time(args: &BenchSelectorsArgs, log: &mut Log) -> Result<()> {
    let model = sizes(&args.shape)?;
    let dtype = dtype(&args.common.dtype)?;
    let specs = match args.selector.as_slice() {
        [] => SelectorConfig::names().map(str::to_string).to_vec(),
        specs => specs.to_vec(),
    };
    let mut methods = Vec::new();
    for attend in Attend::parse_all(&specs, &[])? {
        let name = attend.name().to_string();
        // The last layer: a policy may let the first ones attend exactly.
        match attend.layers(&model)?.pop().flatten() {
            Some(config) => methods.push(Method { name, config }),
            None => bail!("{name} chooses nothing: it attends exactly"),
        }
    }
    let heads =
        Heads { q_heads: model.q_heads, kv_heads: model.kv_heads, head_dim: model.head_dim, dtype };
    let budget = Budget {
        seconds: args.common.seconds,
        window: args.common.window,
        slowest: args.slowest,
        ..Budget::default()
    };
    let device = device::open(&args.common.device)?;
    log.note("random Q and K: the density says nothing of texts".into())?;
    selectors::time(&device, heads, &args.lengths, &methods, &budget, log)
}
