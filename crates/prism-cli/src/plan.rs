//! `prism plan`: what a call of attention would do and need.

use anyhow::{Result, bail};
use burn::tensor::DType;
use burn_prism::{AttentionShape, Budget, Plan, PrismConfig, Rope, Scoring, SelectorConfig};
use prism_models::presets::{self, Family};
use prism_models::shapes;
use serde::Serialize;

use crate::args::PlanArgs;
use crate::{device, model, output};

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    plan: Plan,
    /// Dims of the bands, where scores are made within some.
    high_dims: Option<usize>,
    low_dims: Option<usize>,
    /// Whose published mass acts unless another is given.
    preset: Family,
    config: PrismConfig,
}

pub fn run(args: &PlanArgs) -> Result<()> {
    let device = device::open(&args.device)?;
    let dtype = match args.dtype.as_str() {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        other => bail!("element type must be f32, f16 or bf16, got {other:?}"),
    };
    let model = match (&args.model, &args.shape) {
        (Some(path), _) => Some(model::checkpoint(path)?.config().clone()),
        (None, Some(name)) => Some(shapes::shape(name)?),
        (None, None) => None,
    };
    let (base, q_heads, kv_heads, head_dim) = match &model {
        Some(model) => (presets::recommended(model), model.q_heads, model.kv_heads, model.head_dim),
        None => {
            let base = presets::of(Family::Llama, Rope::new(args.rope_theta));
            (base, args.q_heads, args.kv_heads, args.head_dim)
        }
    };
    let preset = model.as_ref().map_or(Family::Llama, |model| model.architecture.into());
    let keys = args.tokens.saturating_add(args.cached);
    let kv = [args.batch, kv_heads, keys, head_dim];
    let shape = AttentionShape::new([args.batch, q_heads, args.tokens, head_dim], kv, kv)?;
    let config = args.prism.apply(base)?;
    let plan = burn_prism::plan(&config, &shape, None, dtype, &device)?;
    let bands = config.validate(head_dim)?;
    let banded = match &config.selector {
        None => config.scoring == Scoring::Bands,
        Some(selector) => matches!(selector, SelectorConfig::Prism(_)),
    };
    let dims = |band: &[usize]| banded.then_some(band.len());
    let (high_dims, low_dims) = (dims(bands.high()), dims(bands.low()));
    let report = Report { plan, high_dims, low_dims, preset, config };
    if args.json {
        return output::json(&report);
    }
    let mut table = output::table(&["plan", ""]);
    table.add_row(["path".into(), format!("{} ({})", report.plan.path, report.plan.reason)]);
    table.add_row(["computed by".into(), report.plan.kernel.to_string()]);
    for refused in &report.plan.refused {
        table.add_row(["not by".into(), refused.to_string()]);
    }
    table.add_row(["results and scratch".into(), output::bytes(report.plan.bytes)]);
    let mass = match report.config.selection.budget {
        Budget::Mass(mass) if args.prism.mass.is_some() => format!("{mass}, as given"),
        Budget::Mass(mass) => format!("{mass}, published for {preset}"),
        Budget::TopK(blocks) => format!("none: {blocks} blocks a row"),
    };
    table.add_row(["mass".into(), mass]);
    table.add_row(["dense attention".into(), format!("{:.3e} flop", report.plan.dense_flops)]);
    if let (Some(name), Some(by)) = (report.plan.selector, report.plan.selects_by) {
        table.add_row(["selects".into(), format!("{name}, by {by}")]);
    }
    table.add_row(match report.config.scoring {
        _ if let Some(selector) = &report.config.selector => {
            ["options".into(), selector.describe_options()]
        }
        Scoring::Bands => {
            let (high, low) = (bands.high().len(), bands.low().len());
            ["bands".into(), format!("{high} high, {low} low of {head_dim} dims")]
        }
        Scoring::SecondOrder { query_sub, key_sub } => {
            ["sub-blocks".into(), format!("{query_sub} queries, {key_sub} keys")]
        }
    });
    println!("{table}");
    Ok(())
}
