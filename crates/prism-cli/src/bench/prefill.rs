//! `prism bench prefill`: the time to the first token of a whole model, and what it is spent on.
//!
//! Of each length and way to attend: one run, in which kernels are compiled, then the median of at most five,
//! none begun more than two seconds after the first; then one in which the device is waited for between
//! the parts of a layer. A run begins with an empty cache and ends with the logits of the last token on the
//! host. With Prism a run before all these finds how many blocks a row make up the density.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_prism::{AttentionOptions, Budget, PrismConfig, select_blocks};
use prism_bench::{Log, Record};
use prism_models::config::MAX_CONFIG_BYTES;
use prism_models::{LayerTrace, Llama, ModelConfig, PartSeconds, shapes};

use crate::args::{AttentionArg, BenchPrefillArgs};
use crate::memory::PeakMemory;
use crate::{device, output};

/// Runs whose median counts, at most.
const RUNS: usize = 5;
/// No run begins later than this after the first of them.
const SECONDS: f64 = 2.0;
const BLOCK: usize = 128;
const SEED: u64 = 1;
/// Share of the causal blocks unless given.
const DENSITY: f64 = 0.1;

pub(super) fn time(args: &BenchPrefillArgs, log: &mut Log) -> Result<()> {
    let config = check(args)?;
    let dtype = dtype(&args.dtype)?;
    let device = device::open(&args.device)?;
    let start = Instant::now();
    let mut llama = Llama::random(config, dtype, &device, SEED)?;
    log.note(
        "random weights: there is nothing to select by, so the number of blocks a row is fixed"
            .into(),
    )?;
    for &len in &args.lengths {
        for &attention in &args.attention {
            if start.elapsed().as_secs_f64() > args.seconds {
                log.note(format!("skipped, for want of time: {attention:?} at {len} tokens"))?;
                continue;
            }
            let prism = match attention {
                AttentionArg::Prism => Some(fixed(&mut llama, len, args)?),
                AttentionArg::Dense => None,
            };
            llama.set_attention(prism.as_ref())?;
            Prompt::new(&llama, len, args).measure(prism.as_ref(), log)?;
        }
    }
    Ok(())
}

/// The sizes of the model, once all arguments make sense.
fn check(args: &BenchPrefillArgs) -> Result<ModelConfig> {
    ensure!(
        args.random_weights,
        "known shapes have random weights only: say so by --random-weights"
    );
    let config = sizes(&args.shape)?;
    let &BenchPrefillArgs { seconds, chunk, .. } = args;
    let selector = args.selector.config()?;
    if let Some(selector) = selector.filter(|selector| !selector.takes_budget()) {
        ensure!(
            args.density.is_none(),
            "--density is no setting of --selector {selector}: give its own by --set"
        );
    }
    let density = args.density.unwrap_or(DENSITY);
    ensure!(
        density > 0.0 && density <= 1.0,
        "density must be above 0 and at most 1, got {density}"
    );
    ensure!(seconds > 0.0 && seconds.is_finite(), "seconds must be above 0, got {seconds}");
    ensure!(chunk != Some(0), "chunk must be at least 1, got 0");
    ensure!(!args.lengths.is_empty(), "--lengths must name at least one");
    ensure!(!args.lengths.contains(&0), "length must be at least 1, got 0");
    Ok(config)
}

/// An element type by its name.
pub(super) fn dtype(name: &str) -> Result<DType> {
    Ok(match name {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        other => bail!("element type must be f32, f16 or bf16, got {other:?}"),
    })
}

/// The sizes of a known model, or those that a directory's `config.json` states.
pub(super) fn sizes(shape: &str) -> Result<ModelConfig> {
    let file = Path::new(shape).join("config.json");
    if !file.is_file() {
        return Ok(shapes::shape(shape)?);
    }
    let size = file.metadata()?.len();
    ensure!(
        size <= MAX_CONFIG_BYTES,
        "{} has {size} bytes, at most {MAX_CONFIG_BYTES}",
        file.display()
    );
    let json = std::fs::read(&file).with_context(|| format!("can't read {}", file.display()))?;
    Ok(ModelConfig::from_hugging_face(&json)?)
}

/// Settings by which every row reads so many blocks that all read `density` of the causal ones. Each band takes
/// as many, and what both take counts once: how often that happens is measured. Methods with budgets of
/// their own keep them.
fn fixed(llama: &mut Llama, len: usize, args: &BenchPrefillArgs) -> Result<PrismConfig> {
    let rows = len.div_ceil(BLOCK);
    let causal = (rows * (rows + 1) / 2) as f64;
    let blocks = |density: f64| {
        let read = |k: usize| (1..=rows).map(|blocks| blocks.min(k)).sum::<usize>() as f64;
        (1..=rows).find(|&k| read(k) >= density * causal).unwrap_or(rows)
    };
    let mut config = llama.prism_config().with_block(BLOCK).with_dense_below(0);
    if let Some(selector) = args.selector.config()? {
        let own = !selector.takes_budget();
        config = config.with_selector(selector);
        if own {
            return Ok(config);
        }
    }
    let density = args.density.unwrap_or(DENSITY);
    config.selection.budget = Budget::TopK(blocks(density));
    llama.set_attention(Some(&config))?;
    let prompt = Prompt::new(llama, len, args);
    let mut traces = Vec::new();
    prompt.run(Some(&mut |trace| traces.push(trace)))?;
    let density = density.powi(2) / mean_density(&traces)?;
    config.selection.budget = Budget::TopK(blocks(density.min(1.0)));
    Ok(config)
}

/// Selected over causal blocks, all layers together.
fn mean_density(traces: &[LayerTrace]) -> Result<f64> {
    let sum = traces.iter().map(|trace| trace.report.density()).sum::<Result<f64, _>>()?;
    Ok(sum / traces.len().max(1) as f64)
}

struct Prompt<'a> {
    llama: &'a Llama,
    args: &'a BenchPrefillArgs,
    ids: Vec<u32>,
}

impl<'a> Prompt<'a> {
    fn new(llama: &'a Llama, len: usize, args: &'a BenchPrefillArgs) -> Self {
        // Which tokens they are changes nothing: any that differ.
        let vocab = llama.config().vocab_size as u64;
        let id = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % vocab;
        let ids = (1..=len as u64).map(|i| id(i) as u32).collect();
        Self { llama, args, ids }
    }

    /// Seconds to the logits of the last token.
    fn run(&self, trace: Option<&mut dyn FnMut(LayerTrace)>) -> Result<f64> {
        let mut cache = self.llama.cache(self.ids.len(), BLOCK)?;
        let start = Instant::now();
        self.llama.prefill(&self.ids, self.args.chunk, &mut cache, trace)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn measure(&self, prism: Option<&PrismConfig>, log: &mut Log) -> Result<()> {
        let device = self.llama.device();
        device.memory_cleanup();
        let mut peak = PeakMemory::default();
        self.run(None)?;
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.len() < RUNS && (times.is_empty() || start.elapsed().as_secs_f64() < SECONDS) {
            times.push(self.run(None)?);
            peak.note(&device);
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];

        let mut traces = Vec::new();
        let traced = self.run(Some(&mut |trace| traces.push(trace)))?;
        let density = mean_density(&traces)?;
        let mut parts = PartSeconds::default();
        for trace in &traces {
            parts.linear += trace.parts.linear;
            parts.attention += trace.parts.attention;
            parts.rest += trace.parts.rest;
        }
        let held = peak.device_bytes.or(peak.host_bytes);
        let held = held.map_or("not known".into(), output::bytes);
        let by = prism.and(self.args.selector.selector.as_ref());
        let by = by.map_or(String::new(), |name| format!(" by {name}"));
        let what = format!("prefill {}{by}", self.args.shape);
        log.record(self.record(&what, prism, density, seconds, format!("peak {held}")))?;
        let named = [("linear layers", parts.linear), ("attention", parts.attention)];
        for (part, seconds) in named {
            let note = "the device waited for between parts".into();
            log.record(self.record(&format!("{what}: {part}"), prism, density, seconds, note))?;
        }
        if let Some(config) = prism {
            let seconds = self.estimation(config, &device)? * traces.len() as f64;
            let note = "of attention; timed by itself, on random Q and K".into();
            log.record(self.record(
                &format!("{what}: pool, select"),
                prism,
                density,
                seconds,
                note,
            ))?;
        }
        let rest = traced - parts.linear - parts.attention;
        let note = "norms, embedding, the last logits".into();
        log.record(self.record(&format!("{what}: rest"), prism, density, rest, note))
    }

    /// Seconds of pooling and selecting of a layer.
    fn estimation(&self, config: &PrismConfig, device: &Device) -> Result<f64> {
        let ModelConfig { q_heads, kv_heads, head_dim, .. } = *self.llama.config();
        let random = |heads| {
            let dims = [1, heads, self.ids.len(), head_dim];
            Tensor::<4>::random(dims, Distribution::Default, (device, self.llama.dtype()))
        };
        let (q, k) = (random(q_heads), random(kv_heads));
        let mut times = Vec::new();
        // The first finds nothing compiled.
        for _ in 0..RUNS + 1 {
            let _ = device.sync();
            let start = Instant::now();
            select_blocks(q.clone(), k.clone(), config, &AttentionOptions::default())?;
            let _ = device.sync();
            times.push(start.elapsed().as_secs_f64());
        }
        let times = &mut times[1..];
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn record(
        &self,
        what: &str,
        prism: Option<&PrismConfig>,
        density: f64,
        seconds: f64,
        note: String,
    ) -> Record {
        let ModelConfig { q_heads, kv_heads, head_dim, .. } = *self.llama.config();
        Record {
            what: what.into(),
            rung: if prism.is_some() { "prism".into() } else { "dense".into() },
            dtype: self.args.dtype.clone(),
            batch: 1,
            q_heads,
            kv_heads,
            q_len: self.ids.len(),
            kv_len: self.ids.len(),
            head_dim,
            density,
            ms: seconds * 1e3,
            ms_burst: None,
            tflops: None,
            gbps: None,
            peer: false,
            note,
        }
    }
}
