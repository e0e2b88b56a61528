//! The two block products of attention, queries in lanes.
//!
//! A panel is a group of queries, one a lane of `N` vectors. Scores are kept as `[key, lane]` and
//! the output as `[dim, lane]`, so in both products one operand is read a vector at a time and the
//! other an element at a time, straight from the rows of K and V: nothing is transposed or packed
//! but the queries, once a panel, and the softmax in between works along lanes as well.

use pulp::Simd;

/// One value for each query of a panel.
pub(super) type Lanes<S, const N: usize> = [<S as Simd>::f32s; N];

/// Dims that are summed up before they join the score: shorter sums have smaller errors.
const RUN: usize = 32;

/// Rows of K or V.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    /// The rows; the last one may end with its last element instead of a whole stride.
    pub(super) values: &'a [f32],
    /// Elements from one row to the next.
    pub(super) stride: usize,
}

/// `scores[j] = Σ_c queries[c] · keys[j, c]`, with `queries` `[dim]` and `keys` `[scores, dim]`.
///
/// `R` keys at a time share each load of the queries; `N × R` sums must fit the registers.
#[inline(always)]
pub(super) fn score<S: Simd, const N: usize, const R: usize>(
    simd: S,
    queries: &[Lanes<S, N>],
    keys: Rows<'_>,
    scores: &mut [Lanes<S, N>],
) {
    let (groups, rest) = scores.as_chunks_mut::<R>();
    let mut first = 0;
    for group in groups {
        *group = dot::<S, N, R>(simd, queries, keys, first);
        first += R;
    }
    for score in rest {
        [*score] = dot::<S, N, 1>(simd, queries, keys, first);
        first += 1;
    }
}

/// Scores of the `R` keys from `first` on.
#[inline(always)]
fn dot<S: Simd, const N: usize, const R: usize>(
    simd: S,
    queries: &[Lanes<S, N>],
    keys: Rows<'_>,
    first: usize,
) -> [Lanes<S, N>; R] {
    let dim = queries.len();
    let mut rows = [&keys.values[..0]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &keys.values[(first + r) * keys.stride..][..dim];
    }
    let zero = simd.splat_f32s(0.0);
    let mut totals = [[zero; N]; R];
    for (i, queries) in queries.chunks(RUN).enumerate() {
        let mut sums = [[zero; N]; R];
        for (c, query) in queries.iter().enumerate() {
            for r in 0..R {
                let key = simd.splat_f32s(rows[r][i * RUN + c]);
                for n in 0..N {
                    sums[r][n] = simd.mul_add_e_f32s(query[n], key, sums[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                totals[r][n] = simd.add_f32s(totals[r][n], sums[r][n]);
            }
        }
    }
    totals
}

/// `out[c] = rescale · out[c] + Σ_j weights[j] · values[j, c]`, with `values` `[weights, dim]`.
///
/// From key `full` on some lanes are masked: there a weight of zero skips its value, which may
/// belong to a key that the lane must not read and be NaN.
#[inline(always)]
pub(super) fn accumulate<S: Simd, const N: usize, const R: usize>(
    simd: S,
    weights: &[Lanes<S, N>],
    full: usize,
    values: Rows<'_>,
    rescale: Lanes<S, N>,
    out: &mut [Lanes<S, N>],
) {
    let (groups, rest) = out.as_chunks_mut::<R>();
    let mut column = 0;
    for group in groups {
        let sums = weigh::<S, N, R>(simd, weights, full, values, column);
        add(simd, sums, rescale, group);
        column += R;
    }
    for one in rest.as_chunks_mut::<1>().0 {
        let sums = weigh::<S, N, 1>(simd, weights, full, values, column);
        add(simd, sums, rescale, one);
        column += 1;
    }
}

/// `Σ_j weights[j] · values[j, column..column + R]`.
#[inline(always)]
fn weigh<S: Simd, const N: usize, const R: usize>(
    simd: S,
    weights: &[Lanes<S, N>],
    full: usize,
    values: Rows<'_>,
    column: usize,
) -> [Lanes<S, N>; R] {
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; N]; R];
    let (full_weights, masked_weights) = weights.split_at(full);
    let mut at = column;
    for weight in full_weights {
        let row = &values.values[at..][..R];
        for r in 0..R {
            let value = simd.splat_f32s(row[r]);
            for n in 0..N {
                sums[r][n] = simd.mul_add_e_f32s(weight[n], value, sums[r][n]);
            }
        }
        at += values.stride;
    }
    for weight in masked_weights {
        let row = &values.values[at..][..R];
        for n in 0..N {
            let skip = simd.equal_f32s(weight[n], zero);
            for r in 0..R {
                let sum = simd.mul_add_e_f32s(weight[n], simd.splat_f32s(row[r]), sums[r][n]);
                sums[r][n] = simd.select_f32s(skip, sums[r][n], sum);
            }
        }
        at += values.stride;
    }
    sums
}

/// `out = rescale · out + sums`.
///
/// The sums of a tile start from zero and join the total only here: the error of f32 grows with
/// the keys of a tile plus the number of tiles, instead of with their product.
#[inline(always)]
fn add<S: Simd, const N: usize, const R: usize>(
    simd: S,
    sums: [Lanes<S, N>; R],
    rescale: Lanes<S, N>,
    out: &mut [Lanes<S, N>; R],
) {
    for r in 0..R {
        for n in 0..N {
            out[r][n] = simd.mul_add_e_f32s(out[r][n], rescale[n], sums[r][n]);
        }
    }
}
