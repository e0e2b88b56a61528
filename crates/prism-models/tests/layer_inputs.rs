//! Is a visitor of the layers given the Q, K and V that attention reads?

use std::path::Path;

use burn::tensor::{DType, Device, Tensor};
use burn_prism::{AttentionOptions, select_blocks};
use prism_models::{Checkpoint, LayerTrace, Llama, ModelError};

fn tiny(folder: &str) -> Llama {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models").join(folder);
    let checkpoint = Checkpoint::open(root).unwrap();
    Llama::load(&checkpoint, DType::F32, &Device::flex(), &mut |_, _| {}).unwrap()
}

fn ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * i % 509 + 3) as u32).collect()
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_into_vec().unwrap()
}

/// What Prism selects from them is what the layer selected, and the hidden states are the same.
#[test]
fn do_the_inputs_give_the_selection_that_the_layer_made() {
    for folder in ["tiny-llama31", "tiny-qwen2", "tiny-qwen3-yarn"] {
        let mut llama = tiny(folder);
        let config = llama.prism_config().with_block(16).with_mass(0.7).with_dense_below(0);
        llama.set_attention(Some(&config)).unwrap();
        let options = AttentionOptions::default();
        let mut traces: Vec<LayerTrace> = Vec::new();
        let mut cache = llama.cache(200, 16).unwrap();
        let traced =
            llama.hidden(&ids(200), &mut cache, &options, Some(&mut |t| traces.push(t))).unwrap();

        let mut seen = 0;
        let mut cache = llama.cache(200, 16).unwrap();
        let hidden = llama
            .hidden_with_inputs(&ids(200), &mut cache, &options, &mut |inputs| {
                assert_eq!(inputs.layer, seen);
                assert_eq!((inputs.q.dims()[2], inputs.k.dims()[2]), (200, 200));
                let selected = select_blocks(inputs.q, inputs.k, &config, &options)?;
                let made = traces[seen].report.selected.as_ref().unwrap();
                assert_eq!(selected.to_host()?, made.to_host()?);
                seen += 1;
                Ok::<(), ModelError>(())
            })
            .unwrap();
        assert_eq!(seen, llama.config().layers);
        assert_eq!(values(hidden), values(traced));
    }
}

#[test]
fn are_keys_of_earlier_chunks_among_the_inputs() {
    let llama = tiny("tiny-llama31");
    let options = AttentionOptions::default();
    let keys = |chunks: &[usize]| {
        let mut cache = llama.cache(100, 16).unwrap();
        let (mut first, mut keys) = (0, Vec::new());
        for chunk in chunks {
            keys.clear();
            llama
                .hidden_with_inputs(
                    &ids(100)[first..first + chunk],
                    &mut cache,
                    &options,
                    &mut |i| {
                        assert_eq!(i.q.dims()[2], *chunk);
                        keys.push(values(i.k));
                        Ok::<(), ModelError>(())
                    },
                )
                .unwrap();
            first += chunk;
        }
        keys
    };
    for (whole, chunked) in keys(&[100]).iter().zip(keys(&[60, 40])) {
        let worst = whole.iter().zip(chunked).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "keys differ by {worst}");
    }
}

#[test]
fn does_an_error_of_the_visitor_end_the_pass() {
    let llama = tiny("tiny-llama31");
    let mut cache = llama.cache(16, 16).unwrap();
    let mut seen = 0;
    let result =
        llama.hidden_with_inputs(&ids(16), &mut cache, &AttentionOptions::default(), &mut |_| {
            seen += 1;
            Err(ModelError::NoTokens)
        });
    assert!(matches!(result, Err(ModelError::NoTokens)));
    assert_eq!(seen, 1);
}
