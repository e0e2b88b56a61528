//! The matrix product against the definition, with outputs poisoned beforehand: whole small products,
//! sampled elements of large ones.

use half::{bf16, f16};
use prism_bench::Gpu;
use prism_bench::inputs::{poisoned, upload_values, value};
use prism_bench::report::Run;
use prism_kernels::matmul::{Epilogue, MatmulError, MatmulProblem, interleave, matmul_into};
use prism_kernels::{Element, Matrix};
use rayon::prelude::*;

use crate::check::{Task, values};
use crate::check_attention::push;

/// M, N, K.
type Size = [usize; 3];

/// Tails of every dim, an odd number of row tiles, one step along K, a partial last group of rows, more
/// tiles than clusters; few rows, which run without clusters.
const SMALL: [Size; 15] = [
    [256, 256, 64],
    [900, 520, 200],
    [130, 264, 72],
    [1000, 832, 136],
    [2304, 512, 128],
    [300, 1024, 576],
    [129, 8, 8],
    [1300, 6144, 40],
    [257, 16, 1024],
    [1, 4096, 4096],
    [2, 520, 136],
    [17, 264, 72],
    [64, 256, 64],
    [127, 1032, 520],
    [128, 4096, 1024],
];
/// Many rounds of the ring and of tiles.
const LARGE: [Size; 3] = [[4096, 6144, 4096], [8192, 8192, 8192], [5000, 4096, 14_336]];
/// Rows, and columns, of which the elements of large products are checked.
const SAMPLES: usize = 48;

/// What is done with a product.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Plain,
    Residual,
    /// The residual is the output.
    InPlace,
    SwiGlu,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    size: Size,
    element: Element,
    row_major: bool,
    end: End,
    /// Elements between the rows of X, the residual and the output.
    gap: usize,
}

/// The cases of this catalogue, as tasks.
pub fn tasks(gpu: &Gpu, small: bool) -> Vec<Task<'_>> {
    let mut cases = Vec::new();
    for element in [Element::BF16, Element::F16] {
        for row_major in [false, true] {
            for (i, size) in SMALL.into_iter().enumerate() {
                for end in [End::Plain, End::Residual, End::InPlace, End::SwiGlu] {
                    if end != End::SwiGlu || size[1] % 16 == 0 {
                        let gap = if i % 2 == 1 { 24 } else { 0 };
                        cases.push(Case { size, element, row_major, end, gap });
                    }
                }
            }
            if !small && element == Element::BF16 {
                for size in LARGE {
                    for end in [End::Plain, End::Residual, End::SwiGlu] {
                        cases.push(Case { size, element, row_major, end, gap: 0 });
                    }
                }
            }
        }
    }
    let task = |case| Box::new(move |run: &mut Run| product(gpu, case, run)) as Box<_>;
    cases.into_iter().map(task).collect()
}

/// Rounded as the device holds it.
fn rounded(x: f64, element: Element) -> f32 {
    match element {
        Element::F32 => x as f32,
        Element::F16 => f16::from_f64(x).to_f32(),
        Element::BF16 => bf16::from_f64(x).to_f32(),
    }
}

/// Values `[rows, columns]` on the device and here, rows `columns + gap` elements apart, NaN in between.
/// `column_major` lays columns one after the other instead, without gaps.
struct Input {
    matrix: Matrix,
    values: Vec<f32>,
    strides: [usize; 2],
}

impl Input {
    fn new(
        gpu: &Gpu,
        seed: u32,
        shape: [usize; 2],
        (column_major, gap): (bool, usize),
        scale: f64,
        element: Element,
    ) -> Self {
        let [rows, columns] = shape;
        let strides = if column_major { [1, rows] } else { [columns + gap, 1] };
        let len = if column_major { rows * columns } else { rows * (columns + gap) };
        let make = |i| {
            let between = !column_major && i % (columns + gap) >= columns;
            if between { f32::NAN } else { rounded(scale * value(seed, i, Element::F32), element) }
        };
        let values: Vec<f32> = (0..len).into_par_iter().map(make).collect();
        let handle = upload_values(gpu, &values, [1, 1, 1, len], element).handle;
        Self { matrix: Matrix::new(handle, shape, strides, element), values, strides }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.strides[0] + column * self.strides[1]].into()
    }
}

/// All of them, or some: the first, the last, those beside the ends of tiles, and some between.
fn sampled(extent: usize, all: bool) -> Vec<usize> {
    if all {
        return (0..extent).collect();
    }
    let mut places: Vec<usize> = (0..SAMPLES).map(|i| i * extent / SAMPLES + i % 8).collect();
    places.extend([0, 63, 64, 127, 128, 255, 256, extent / 2, extent - 1]);
    places.retain(|&i| i < extent);
    places.sort_unstable();
    places.dedup();
    places
}

fn product(gpu: &Gpu, case: Case, run: &mut Run) {
    let Case { size: [m, n, k], element, row_major, end, gap } = case;
    let name = format!("matmul {case:?}");
    let x = Input::new(gpu, 1, [m, k], (false, gap), 1.0, element);
    // Sums of about 1, so that silu does something.
    let scale = 1.0 / (k as f64).sqrt();
    let order = (!row_major, 0);
    let columns = if end == End::SwiGlu { n / 2 } else { n };
    let weight = |seed, columns| Input::new(gpu, seed, [k, columns], order, scale, element);
    let (w, up) = (weight(2, columns), (end == End::SwiGlu).then(|| weight(3, columns)));
    let residual = Input::new(gpu, 4, [m, columns], (false, gap), 1.0, element);
    let both = match &up {
        Some(up) => match interleave(&gpu.client, &w.matrix, &up.matrix) {
            Ok(both) => Some(both),
            Err(error) => return push(run, name, Err(error.to_string())),
        },
        None => None,
    };
    let out = if end == End::InPlace {
        residual.matrix.clone()
    } else {
        let handle = poisoned(gpu, m * (columns + gap), element);
        Matrix::new(handle, [m, columns], [columns + gap, 1], element)
    };
    let epilogue = match end {
        End::Plain => Epilogue::Plain,
        End::Residual | End::InPlace => Epilogue::Residual(&residual.matrix),
        End::SwiGlu => Epilogue::SwiGlu,
    };
    let problem = MatmulProblem::new(&x.matrix, both.as_ref().unwrap_or(&w.matrix), epilogue);
    match matmul_into(&gpu.client, &gpu.capabilities, &problem, &out) {
        Ok(()) => {}
        Err(MatmulError::NoHopper) => return,
        Err(error) => return push(run, name, Err(error.to_string())),
    }
    let got = values(gpu, &out.handle, element);

    let all = m * n * k < 1 << 28;
    let (rows, wanted) = (sampled(m, all), sampled(columns, all));
    let dot =
        |w: &Input, row, column| -> f64 { (0..k).map(|i| x.at(row, i) * w.at(i, column)).sum() };
    // Half a unit in the last place.
    let rounding = if element == Element::BF16 { 1.0 / 256.0 } else { 1.0 / 2048.0 };
    let errors = rows.par_iter().flat_map_iter(|&row| {
        let (dot, w, up, residual, got) = (&dot, &w, &up, &residual, &got);
        wanted.iter().map(move |&column| {
            let sum = dot(w, row, column);
            let want = match (end, up) {
                (End::SwiGlu, Some(up)) => sum / (1.0 + (-sum).exp()) * dot(up, row, column),
                (End::Residual | End::InPlace, _) => sum + residual.at(row, column),
                _ => sum,
            };
            let got: f64 = got[row * (columns + gap) + column].into();
            ((got - want).abs() / (rounding * want.abs() + 1e-3), (row, column), got, want)
        })
    });
    let worst = errors
        .max_by(|a, b| {
            // NaN is worst.
            let size = |error: f64| if error.is_nan() { f64::INFINITY } else { error };
            size(a.0).total_cmp(&size(b.0))
        })
        .unwrap_or((0.0, (0, 0), 0.0, 0.0));
    let line = columns + gap;
    let touched = (0..m * line).find(|&i| i % line >= columns && !got[i].is_nan());
    let (error, place, got, want) = worst;
    let detail = format!("{error:.2} of the tolerance at {place:?}: {got} for {want}");
    let result = match touched {
        Some(at) => Err(format!("element {at} between the rows was written")),
        // NaN isn't.
        None if error <= 1.0 => Ok(detail),
        None => Err(detail),
    };
    push(run, name, result);
}
