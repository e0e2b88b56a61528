//! `emit FOLDER`: the CUDA C++ of every kernel in the shapes that matter, without a GPU.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use cubecl::Device;
use prism_core::bands::{BandRule, Bands};
use prism_core::select::{ByMass, Prefix};
use prism_core::{BlockGrid, Calibration, Rope, RopeLayout, SelectionRule, Side};
use prism_kernels::attend::{AttendProblem, AttendRung, attend_on};
use prism_kernels::band_mask::BandMask;
use prism_kernels::calibrate::calibrate;
use prism_kernels::matmul::{Epilogue, MatmulProblem, interleave, matmul};
use prism_kernels::moments::pool_moments;
use prism_kernels::offline::{hopper, sources};
use prism_kernels::pool::{pool, pool_one};
use prism_kernels::rotate::{RotaryTable, RotateProblem, rotate, rotate_and_pool};
use prism_kernels::select::antidiagonal::{AntidiagonalProblem, antidiagonal_masses};
use prism_kernels::select::outliers::{OutliersProblem, select_outliers_on};
use prism_kernels::select::{
    MassesProblem, SecondOrderProblem, SelectProblem, SelectRung, Selection, heaviest_prefix,
    line_sums, select_blocks_on, select_by_second_order, select_from_masses,
};
use prism_kernels::{Element, Matrix, Operand};

#[derive(Parser)]
struct Arguments {
    /// Where the sources go, one file a kernel.
    folder: PathBuf,
    /// Head dimensions; matrix products only with all of them.
    #[arg(long, value_delimiter = ',')]
    dims: Option<Vec<usize>>,
}

fn main() -> Result<()> {
    let Arguments { folder, dims } = Arguments::parse();
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("can't create {}", folder.display()))?;
    let client = Device::Cpu(Default::default()).client();
    let mut all = BTreeMap::new();
    for (element, name) in [(Element::BF16, "bf16"), (Element::F16, "f16"), (Element::F32, "f32")] {
        for &dim in dims.as_deref().unwrap_or(&[64, 80, 96, 128, 256]) {
            for (suffix, source) in kernels(&client, element, dim)? {
                all.insert(format!("{suffix}_{name}_d{dim}"), source);
            }
        }
    }
    if dims.is_none() {
        all.extend(products(&client)?);
    }
    for (name, source) in &all {
        let path = folder.join(format!("{name}.cu"));
        std::fs::write(&path, source).with_context(|| format!("can't write {}", path.display()))?;
    }
    println!("{} kernels in {}", all.len(), folder.display());
    Ok(())
}

/// Every kernel of a sparse and a dense call of a Llama-shaped layer.
fn kernels(
    client: &cubecl::client::Client,
    element: Element,
    dim: usize,
) -> Result<Vec<(String, String)>> {
    let (heads, kv_heads, len) = (8, 2, 1024);
    let operand = |heads| Operand::contiguous(client.empty(4), [1, heads, len, dim], element);
    let (q, k, v) = (operand(heads), operand(kv_heads), operand(kv_heads));
    let grids = [BlockGrid::new(128, len, len)?];
    let bands = Bands::new(BandRule::Auto, Some(&Rope::new(5e5)), dim, 128)?;
    let mask = BandMask::new(&bands);
    let rule = SelectionRule::default();
    let capabilities = hopper();
    let mut all = sources(|| {
        let (pooled_q, pooled_k) = pool(client, &capabilities, &q, &k, &grids, &mask);
        let shape = [heads, kv_heads, dim];
        let factors = calibrate(
            client,
            &capabilities,
            &pooled_q,
            &pooled_k,
            None,
            &grids,
            shape,
            &mask,
            Calibration::Global,
        );
        let problem = SelectProblem::new(
            &pooled_q.means,
            &pooled_k.means,
            &factors,
            shape,
            &grids,
            &mask,
            &rule,
            false,
        );
        for rung in [SelectRung::Mma, SelectRung::Plane] {
            if rung.runs(&capabilities, &problem) {
                select_blocks_on(client, &capabilities, &problem, rung);
            }
        }
    });
    let by_second_order = sources(|| {
        let (subs, shape) = ([32, 16], [heads, kv_heads, dim]);
        let [q_grids, k_grids] = subs.map(|sub| grids.map(|grid| grid.subdivided(sub)));
        let q_subs = pool_one(client, &capabilities, &q, &q_grids, Side::Queries);
        let k_subs = pool_moments(client, &capabilities, &k, &k_grids);
        let problem = SecondOrderProblem::new(
            &q_subs.means,
            &k_subs.means,
            &k_subs.variances,
            shape,
            &grids,
            subs,
            &rule,
            false,
        );
        select_by_second_order(client, &capabilities, &problem);
    });
    let mut by_outliers = Vec::new();
    for rung in [SelectRung::Mma, SelectRung::Unit] {
        let problem = OutliersProblem::new(&q, &k, &grids, [32, 32], 1 << 24, 0.1, &rule, false);
        let mut result = Ok(());
        if problem.runs(&capabilities, rung) {
            by_outliers.extend(sources(|| {
                result = select_outliers_on(client, &capabilities, &problem, rung).map(drop);
            }));
        }
        result?;
    }
    by_outliers.retain(|(name, _)| name.starts_with("outlier") || name.starts_with("shortest"));
    all.extend(by_outliers);
    for stride in [8, 16] {
        let problem = AntidiagonalProblem::new(&q, &k, &grids[0], 0..len / 128, stride, 0.1);
        if problem.runs(&capabilities) {
            let recorded = sources(|| {
                antidiagonal_masses(client, &capabilities, &problem);
            });
            let named = |(kernel, source)| (format!("{kernel}_stride{stride}"), source);
            all.extend(recorded.into_iter().map(named));
        }
    }
    if element == Element::F32 {
        let (handle, words) = (client.empty(4), len.div_ceil(128 * 32));
        let shape = [heads, len / 128, 1, len / 128];
        let by = ByMass::AfterForced(Some(1 << 29));
        let problem = MassesProblem::new(&handle, shape, &grids[0], 0, words, by, &rule, false);
        all.extend(sources(|| {
            select_from_masses(client, &capabilities, &problem);
            line_sums(client, &capabilities, &handle, [heads, 64, len], 0);
            let shape = [heads, len];
            heaviest_prefix(client, &capabilities, &handle, &handle, shape, Prefix::Within);
        }));
    }
    for (layout, name) in
        [(RopeLayout::RotateHalf, "half"), (RopeLayout::Interleaved, "interleaved")]
    {
        let table = RotaryTable::new(client.empty(4), client.empty(4), len, dim, layout);
        let problem = RotateProblem::new(&q, &k, &table, &grids, &mask);
        let cached = RotateProblem { prescale: Some(0.1), cache: Some(&v), ..problem.clone() };
        // New keys are as many as queries: the whole prompt.
        for (problem, kind) in [(&problem, ""), (&cached, "_into_cache"), (&problem, "_alone")] {
            let mut result = Ok(());
            let recorded = sources(|| {
                result = match kind {
                    "_alone" => rotate(client, &capabilities, problem).map(drop),
                    _ => rotate_and_pool(client, &capabilities, problem).map(drop),
                };
            });
            result?;
            let named = |(kernel, source)| (format!("{kernel}_{name}{kind}"), source);
            all.extend(recorded.into_iter().map(named));
        }
    }
    // Some of its kernels are of the other way too, in another shape.
    for (name, source) in by_second_order {
        let shared = all.iter().any(|(other, _)| *other == name);
        all.push((if shared { format!("{name}_second_order") } else { name }, source));
    }
    let dense = AttendProblem::new(&q, &k, &v, &grids, None, None, 0.1, true);
    for rung in [AttendRung::Plane, AttendRung::Mma, AttendRung::Hopper] {
        if rung.check(&capabilities, &dense).is_ok() {
            all.extend(sources(|| {
                attend_on(client, &capabilities, &dense, rung);
            }));
        }
    }
    let rows = len / 128;
    let (words, counts) = (client.empty(4), client.empty(4));
    let selection = Selection { words, counts, rows, words_per_row: rows.div_ceil(32) };
    let order = client.empty(4);
    let sparse =
        AttendProblem { selection: Some(&selection), order: Some(&order), ..dense.clone() };
    if AttendRung::Hopper.check(&capabilities, &sparse).is_ok() {
        let recorded = sources(|| {
            attend_on(client, &capabilities, &sparse, AttendRung::Hopper);
        });
        all.extend(recorded.into_iter().map(|(name, source)| (format!("{name}_sparse"), source)));
        for (problem, suffix) in [(&dense, "dense"), (&sparse, "sparse")] {
            let prescaled = AttendProblem { prescaled: true, ..problem.clone() };
            let recorded = sources(|| {
                attend_on(client, &capabilities, &prescaled, AttendRung::Hopper);
            });
            let named = |(name, source)| (format!("{name}_{suffix}_prescaled"), source);
            all.extend(recorded.into_iter().map(named));
        }
    }
    Ok(all)
}

/// The matrix product: every epilogue, both orders of the weight, with and without clusters.
fn products(client: &cubecl::client::Client) -> Result<Vec<(String, String)>> {
    let capabilities = hopper();
    let mut all = Vec::new();
    for (element, type_name) in [(Element::BF16, "bf16"), (Element::F16, "f16")] {
        let ([m, n, k], buffer) = ([512, 1024, 256], client.empty(4));
        let row_major = |shape| Matrix::row_major(buffer.clone(), shape, element);
        let column_major = |shape| Matrix::column_major(buffer.clone(), shape, element);
        // A product of few rows has no use for clusters.
        for (m, (w, order)) in [m, 128]
            .into_iter()
            .flat_map(|m| [(row_major([k, n]), "kn"), (column_major([k, n]), "nk")].map(|w| (m, w)))
        {
            let (x, residual) = (row_major([m, k]), row_major([m, n]));
            for (epilogue, name) in [
                (Epilogue::Plain, "plain"),
                (Epilogue::Residual(&residual), "residual"),
                (Epilogue::SwiGlu, "swiglu"),
            ] {
                let problem = MatmulProblem::new(&x, &w, epilogue);
                let mut result = Ok(());
                let recorded = sources(|| {
                    result = matmul(client, &capabilities, &problem).map(drop);
                });
                result?;
                let suffix = format!("{name}_{order}_{type_name}");
                let named = |(kernel, source)| (format!("{kernel}_{suffix}"), source);
                all.extend(recorded.into_iter().map(named));
            }
        }
        if element == Element::BF16 {
            for (half, order) in [(row_major([k, n]), "kn"), (column_major([k, n]), "nk")] {
                let mut result = Ok(());
                let recorded = sources(|| {
                    result = interleave(client, &half, &half).map(drop);
                });
                result?;
                let named = |(kernel, source)| (format!("{kernel}_{order}"), source);
                all.extend(recorded.into_iter().map(named));
            }
        }
    }
    Ok(all)
}
