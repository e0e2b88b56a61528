//! How rotary position embeddings turn positions into angles.

/// Rotary position embedding of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSettings {
    /// Base of the inverse frequencies, `theta^(-2i / rotary_dim)`.
    pub theta: f64,
    /// Number of leading channels of a head that rotate; even, and at most the head dimension.
    pub rotary_dim: usize,
    /// Change of the frequencies that stretches the context.
    pub scaling: RopeScaling,
}

/// Change of the rotary frequencies for contexts longer than those of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Ratio of the stretched to the original context, at least 1.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp in between.
    Llama3 {
        /// Divisor of the low frequencies, at least 1.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are divided in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training, in tokens.
        original_max_positions: usize,
    },
    /// YaRN: interpolation by parts, with a temperature on the attention scores.
    Yarn {
        /// Ratio of the stretched to the original context, at least 1.
        factor: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over the original context below which a frequency is divided in full.
        beta_slow: f64,
        /// Context length of pre-training, in tokens.
        original_max_positions: usize,
        /// Multiplier of the cosines and sines; `None` stands for `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
    },
}
