//! Prism over means of parts of blocks, and long prompts, whose rows are asked for and chosen in several
//! goes: is what devices choose what the host chooses?

use burn::tensor::{DType, Device};
use burn_prism::plan::Kernel;
use burn_prism::{AttentionShape, BandRule, PrismConfig, SelectorConfig, plan};
use prism_core::Bands;
use rstest::rstest;
use tests::devices;

use super::selector_problem::{Problem, bare, of};

#[rstest]
#[case::whole(&[(400, 400)])]
#[case::chunk(&[(137, 395)])]
#[case::ragged(&[(300, 300), (61, 61), (0, 0), (5, 290)])]
fn parts_of_blocks_are_scored_on_devices(#[case] lengths: &[(usize, usize)]) {
    let mut problem = Problem::new(lengths, DType::F32, 113);
    problem.block = 64;
    let config = bare().with_block(64);
    let mut limited = config.clone();
    limited.selection.sink_blocks = 1;
    limited.selection.dense_last_blocks = 1;
    limited.selection.min_blocks = 2;
    limited.selection.max_blocks = Some(3);
    for device in devices() {
        for pool in ["16", "32", "64"] {
            for calibration in ["global", "causal", "off"] {
                let settings =
                    [("mass", "0.7"), ("pool_block", pool), ("calibration", calibration)];
                for config in [&config, &limited] {
                    problem.check(&of("prism", &settings), config, DType::F32, &device);
                }
            }
        }
    }
}

/// More elements than one go holds, 2²²: 1026 rows of 2 × 4 heads over 1033 blocks are chosen in three, and
/// asked for in more; with queries from the middle of a block on.
#[test]
fn long_prompts_are_chosen_in_several_goes() {
    let mut problem = Problem::new(&[(32_810, 33_050); 2], DType::F32, 127);
    problem.block = 32;
    let mut config = bare().with_block(32);
    // Rows that would read nothing read this one: less by a lower threshold, then.
    config.selection.recent_blocks = 1;
    let outliers = [("threshold", "0.0012"), ("query_sub", "32"), ("key_sub", "16")];
    for (selector, doubt) in [
        // Some three of a thousand blocks that are as heavy as each other but for rounding.
        (of("prism", &[("mass", "0.7"), ("pool_block", "16")]), 3e-3),
        (of("outliers", &outliers), 1e-5),
        (of("lsh", &[("buckets", "8"), ("rounds", "2")]), 0.0),
        (of("streaming", &[("sink", "32"), ("window", "640")]), 0.0),
        (of("dilated", &[("segments", "1024,4096"), ("strides", "1,3")]), 0.0),
    ] {
        problem.doubt = doubt;
        problem.check(&selector, &config, DType::F32, &Device::flex());
    }
}

#[test]
fn parts_of_blocks_stand_beside_the_settings() {
    let layer = PrismConfig::smollm2();
    let with = |settings: &[(&str, &str)]| layer.clone().with_selector(of("prism", settings));
    assert_eq!(with(&[("mass", "0.9")]), layer.clone().with_mass(0.9));
    let parts = with(&[("pool_block", "32"), ("mass", "0.9")]);
    assert_eq!(parts.selection, layer.selection);
    // Bands are those of what is pooled.
    let of_32 = Bands::new(BandRule::Auto, Some(&layer.rope), 128, 32).unwrap();
    assert_eq!(parts.validate(128).unwrap(), of_32);
    assert_ne!(layer.validate(128).unwrap(), of_32);
    // It stays, whatever the block becomes.
    let whole = parts.clone().with_block(32);
    assert!(whole.validate(64).is_ok() && whole.selector.is_some());

    let says = |config: PrismConfig| config.validate(64).unwrap_err().to_string();
    let error = says(parts.clone().with_block(16));
    assert!(error.contains("divide the block of 16, got 32"), "{error}");
    let error = says(parts.with_bands(16, 48));
    assert!(error.contains("beside prism no scoring, bands or calibration is set"), "{error}");
    let error = says(with(&[("pool_block", "48")]));
    assert!(error.contains("divide the block of 128, got 48"), "{error}");
    let error = says(with(&[("pool_block", "32"), ("high_dims", "80"), ("low_dims", "0")]));
    assert!(error.contains("at most the rotary dim (64), got 80"), "{error}");
    let mut settings = layer.clone();
    settings.selector = Some(SelectorConfig::Prism(Default::default()));
    assert!(says(settings).contains("prism is set by scoring, bands and calibration"));
}

/// Smaller parts are more means.
#[test]
fn plans_count_the_means_of_parts() {
    let kv = [1, 2, 8192, 64];
    let shape = AttentionShape::new([1, 4, 8192, 64], kv, kv).unwrap();
    let planned = |pool: &str| {
        let config = PrismConfig::smollm2().with_dense_below(0);
        let config = config.with_selector(of("prism", &[("pool_block", pool)]));
        plan(&config, &shape, None, DType::F32, &Device::flex()).unwrap()
    };
    let (fine, coarse) = (planned("16"), planned("64"));
    assert_eq!((fine.selector, fine.selects_by), (Some("prism"), Some(Kernel::TensorOps)));
    // 6 heads of 512 − 128 means more, thrice, of 64 f32.
    assert_eq!(fine.bytes - coarse.bytes, 3 * 6 * (512 - 128) * 64 * 4);
}
