//! What the tests of selectors choose from, and when a choice counts as right.

use burn::tensor::{DType, Device};
use burn_prism::{
    AttentionOptions, AttentionShape, BlockGrid, BlockSelection, PrismConfig, Rope, SelectionRule,
    SelectorConfig, SequenceLengths, select_blocks_by,
};
use prism_core::selectors::{Selector, SelectorInput};
use tests::{Inputs, Kind, has_exact_products};

/// Positions a block unless a test says otherwise.
pub const BLOCK: usize = 16;

/// A method with settings.
pub fn of(name: &str, settings: &[(&str, &str)]) -> SelectorConfig {
    SelectorConfig::from_settings(name, settings).unwrap()
}

/// Q and K, and what is chosen of them on the host and on a device.
pub struct Problem {
    pub inputs: Inputs,
    pub lengths: Vec<(usize, usize)>,
    pub block: usize,
    /// How far from its threshold a cumulative mass may lie for rounding to decide about a block.
    pub doubt: f64,
}

impl Problem {
    pub fn new(lengths: &[(usize, usize)], dtype: DType, seed: u64) -> Self {
        Self::with_heads([4, 2, 16], lengths, dtype, seed)
    }

    /// Of `[q_heads, kv_heads, head_dim]`.
    pub fn with_heads(
        [q_heads, kv_heads, d]: [usize; 3],
        lengths: &[(usize, usize)],
        dtype: DType,
        seed: u64,
    ) -> Self {
        let longest = |f: fn(&(usize, usize)) -> usize| lengths.iter().map(f).max().unwrap();
        let (q_len, kv_len) = (longest(|x| x.0), longest(|x| x.1));
        let kv = [lengths.len(), kv_heads, kv_len, d];
        let shape = AttentionShape::new([lengths.len(), q_heads, q_len, d], kv, kv).unwrap();
        let inputs = Inputs::random(shape, Kind::Normal, dtype, seed);
        Self { inputs, lengths: lengths.to_vec(), block: BLOCK, doubt: 1e-4 }
    }

    pub fn grids(&self) -> Vec<BlockGrid> {
        let grid = |&(q, kv): &(usize, usize)| BlockGrid::new(self.block, q, kv).unwrap();
        self.lengths.iter().map(grid).collect()
    }

    pub fn options(&self) -> AttentionOptions {
        let (q, kv) = self.lengths.iter().copied().unzip();
        AttentionOptions::default().with_lengths(SequenceLengths::new(q, kv))
    }

    pub fn host(&self, selector: &SelectorConfig, config: &PrismConfig) -> BlockSelection {
        let grids = self.grids();
        let input = SelectorInput {
            rope: Some(&config.rope),
            rule: config.selection,
            scale: config.scale.unwrap_or(0.25),
            ..SelectorInput::new(&self.inputs.q, &self.inputs.k, self.inputs.shape, &grids)
        };
        selector.select(&input).unwrap()
    }

    /// The device chooses what the host chooses; a block may differ whose cumulative mass lies near the
    /// threshold, the nearer unless scores round to TF32.
    pub fn check(
        &self,
        selector: &SelectorConfig,
        config: &PrismConfig,
        dtype: DType,
        device: &Device,
    ) {
        let [q, k, _] = self.inputs.tensors(dtype, device);
        let selected = select_blocks_by(q, k, selector, config, &self.options()).unwrap();
        let (got, host) = (selected.to_host().unwrap(), self.host(selector, config));
        got.validate(&self.grids(), self.inputs.shape.q_heads).unwrap();
        if got == host {
            return;
        }
        let what = format!("{device:?} {dtype:?} {selector} {:?}", self.lengths);
        let mass = match selector {
            SelectorConfig::XAttention(options) => options.threshold,
            SelectorConfig::Outliers(options) => options.threshold,
            SelectorConfig::FlexPrefill(options) => options.gamma,
            _ if config.selection.max_blocks.is_some() => panic!("{what}: another selection"),
            SelectorConfig::Prism(_)
            | SelectorConfig::SecondOrder(_)
            | SelectorConfig::MeanPool(_)
            | SelectorConfig::Oracle(_) => 0.7,
            _ => panic!("{what}: {} blocks differ", differ(&got, &host)),
        };
        let near = |mass: f64| {
            let dial = selector.dial().unwrap();
            let selector = selector.with_settings(&[(dial, mass.to_string())]).unwrap();
            self.host(&selector, config).to_bools()
        };
        let doubt = if has_exact_products(device) { self.doubt } else { 5e-3 };
        let (mut least, mut most) = (near(mass - doubt), near(mass + doubt));
        if matches!(selector, SelectorConfig::Outliers(_)) {
            // The higher its threshold, the less is read.
            std::mem::swap(&mut least, &mut most);
        }
        for (i, got) in got.to_bools().into_iter().enumerate() {
            assert!(got >= least[i] && got <= most[i], "{what}: block {i} of all");
        }
    }
}

/// Blocks that differ.
fn differ(a: &BlockSelection, b: &BlockSelection) -> usize {
    a.to_bools().iter().zip(b.to_bools()).filter(|&(&a, b)| a != b).count()
}

/// Settings without forced blocks.
pub fn bare() -> PrismConfig {
    let mut config = PrismConfig::new(Rope::new(1e3)).with_block(BLOCK).with_dense_below(0);
    config.selection = SelectionRule {
        sink_blocks: 0,
        recent_blocks: 0,
        dense_last_blocks: 0,
        min_blocks: 0,
        ..SelectionRule::default()
    };
    config
}
