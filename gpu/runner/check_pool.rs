//! Pooling against the definition, and factors that are numbers.

use prism_bench::Gpu;
use prism_bench::inputs::{Dims, tensor, value};
use prism_bench::report::Run;
use prism_core::bands::{BandRule, Bands};
use prism_core::{Calibration, Rope, Side, oracle};
use prism_kernels::Element;
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::pool::{pool, pool_one};

use crate::check::values;
use crate::check_attention::{ELEMENTS, grids, push};

/// Block means of every element type, and the factors of each calibration.
pub(super) fn pooling(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    for (dims, block) in [([1, 4, 2, 1000, 1500, 128], 128), ([2, 3, 1, 300, 300, 80], 48)] {
        let [batch, q_heads, kv_heads, q_len, kv_len, dim]: Dims = dims;
        let grids = grids(dims, block, None);
        let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, block).expect("bands");
        let mask = BandMask::new(&bands);
        for element in ELEMENTS {
            let q = tensor(gpu, 1, [batch, q_heads, q_len, dim], element);
            let k = tensor(gpu, 2, [batch, kv_heads, kv_len, dim], element);
            let (pooled_q, pooled_k) = pool(client, capabilities, &q, &k, &grids, &mask);
            let all = |seed, len: usize| -> Vec<f64> {
                (0..len).map(|i| value(seed, i, element)).collect()
            };
            let want_q = oracle::pool_queries(
                &all(1, batch * q_heads * q_len * dim),
                q_heads,
                q_len,
                dim,
                &grids,
            );
            let want_k = oracle::pool_keys(
                &all(2, batch * kv_heads * kv_len * dim),
                kv_heads,
                kv_len,
                dim,
                &grids,
            );
            let alone = pool_one(client, capabilities, &k, &grids, Side::Keys);
            for (name, got, want) in
                [("q", &pooled_q, &want_q), ("k", &pooled_k, &want_k), ("k alone", &alone, &want_k)]
            {
                let got = values(gpu, &got.means, Element::F32);
                let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                let what = format!("pool {name} {element:?} {dims:?}");
                let detail = format!("largest error {worst:.1e}");
                push(run, what, if worst < 1e-5 { Ok(detail) } else { Err(detail) });
            }
            let heads = [q_heads, kv_heads, dim];
            for mode in [Calibration::Global, Calibration::Causal, Calibration::Off] {
                let factors = calibrate(
                    client,
                    capabilities,
                    &pooled_q,
                    &pooled_k,
                    None,
                    &grids,
                    heads,
                    &mask,
                    mode,
                );
                let finite = values(gpu, &factors, Element::F32).iter().all(|x| x.is_finite());
                let what = format!("calibrate {mode:?} {element:?} {dims:?}");
                push(run, what, if finite { Ok(String::new()) } else { Err("not finite".into()) });
            }
        }
    }
}
