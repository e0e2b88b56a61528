//! What chooses blocks.

use anyhow::{Result, bail};
use burn_prism::SelectorConfig;
use clap::Args;

#[derive(Debug, Args)]
pub struct SelectorArgs {
    /// What chooses blocks, in place of Prism's scoring: prism, second_order, outliers, mean_pool,
    /// xattention, flexprefill, minference, streaming, dilated, lsh, top_k or oracle (docs/selectors.md)
    #[arg(long, value_name = "NAME")]
    pub selector: Option<String>,
    /// An option of --selector, as stride=16; may be given more than once
    #[arg(long, value_name = "KEY=VALUE", requires = "selector")]
    pub set: Vec<String>,
}

impl SelectorArgs {
    /// The method with its options, if one was named.
    pub fn config(&self) -> Result<Option<SelectorConfig>> {
        let Some(name) = &self.selector else {
            return Ok(None);
        };
        let mut settings = Vec::new();
        for setting in &self.set {
            let Some(pair) = setting.split_once('=') else {
                bail!("--set must be KEY=VALUE, got {setting:?}");
            };
            settings.push(pair);
        }
        Ok(Some(SelectorConfig::from_settings(name, &settings)?))
    }
}
