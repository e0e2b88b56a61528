//! How a model attends: exactly, with one set of Prism's settings, or as a policy says.

use anyhow::{Context, Result, bail};
use burn_prism::{Budget, PrismConfig};
use prism_models::{AttentionPolicy, Llama};

use crate::args::{AttentionArg, AttentionArgs};

/// Positions a block where nothing pools.
const BLOCK: usize = 128;

/// Attention of every layer of a model.
#[derive(Debug, Clone)]
pub enum Attention {
    Dense,
    Prism(PrismConfig),
    Policy(AttentionPolicy),
}

/// Refuses arguments that say two things, before a model is opened.
pub fn check(attention: AttentionArg, args: &AttentionArgs) -> Result<()> {
    let selector = args.prism.selector.config()?;
    if attention == AttentionArg::Dense {
        for (name, given) in [("policy", args.policy.is_some()), ("selector", selector.is_some())] {
            if given {
                bail!("--{name} needs --attention prism: what attends exactly has no settings");
            }
        }
    }
    Ok(())
}

impl Attention {
    /// What the arguments ask for, of a model that is open.
    pub fn new(attention: AttentionArg, args: &AttentionArgs, llama: &Llama) -> Result<Self> {
        check(attention, args)?;
        let config = args.prism.apply(llama.prism_config())?;
        Ok(match (attention, &args.policy) {
            (AttentionArg::Dense, _) => Self::Dense,
            (AttentionArg::Prism, None) => Self::Prism(config),
            (AttentionArg::Prism, Some(file)) => {
                let policy = AttentionPolicy::open(file);
                Self::Policy(policy.with_context(|| format!("can't use {}", file.display()))?)
            }
        })
    }

    /// Lets a model attend so.
    pub fn set(&self, llama: &mut Llama) -> Result<()> {
        match self {
            Self::Dense => llama.set_attention(None)?,
            Self::Prism(config) => llama.set_attention(Some(config))?,
            Self::Policy(policy) => llama.set_policy(policy)?,
        }
        Ok(())
    }

    /// Positions a block of the caches.
    pub fn block(&self) -> usize {
        match self {
            Self::Dense => BLOCK,
            Self::Prism(config) => config.block,
            Self::Policy(policy) => policy.block.unwrap_or(BLOCK),
        }
    }

    /// The mass of all heads of all layers, where there is one.
    pub fn mass(&self) -> Option<f64> {
        match self {
            Self::Prism(config) => match (&config.selector, config.selection.budget) {
                (None, Budget::Mass(mass)) => Some(mass),
                (Some(selector), Budget::Mass(mass)) if selector.takes_budget() => Some(mass),
                _ => None,
            },
            Self::Dense | Self::Policy(_) => None,
        }
    }

    /// For progress.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Prism(_) | Self::Policy(_) => "prism",
        }
    }
}
