//! What the last queries read, added up by key and by distance: the vertical and slash lines of MInference
//! and FlexPrefill, from the scores of those queries.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::attend::softmax::{inverse, nothing, reference};
use crate::capabilities::Capabilities;
use crate::fixed::usable;
use crate::operand::buffer;
use crate::special::exp2;
use crate::work::{cube_count, launch};

/// Rows a cube of planes.
const PLANES: u32 = 4;
/// Scores that a unit reads at once.
const AHEAD: usize = 4;

/// Sums of probabilities of the rows of each head, `[heads, len]` f32 each.
pub struct Lines {
    /// Of each key.
    pub vertical: Handle,
    /// Of each distance of a key from the last one that its query sees.
    pub slash: Handle,
}

/// Softmax of `scores` `[heads, rows, len]` f32, of which row r sees the first `len` − `first` − r: the last
/// queries in reverse order, the `first` latest ones left out, with `first` + `rows` ≤ `len`. A NaN counts for nothing and an infinite score as the largest
/// finite number. In a fixed order: the same each time. Below 2³² scores.
pub fn line_sums(
    client: &Client,
    capabilities: &Capabilities,
    scores: &Handle,
    [heads, rows, len]: [usize; 3],
    first: usize,
) -> Lines {
    let elements = heads * len;
    let [vertical, slash] = [(); 2].map(|()| client.empty((elements * 4).max(4)));
    let lines = Lines { vertical, slash };
    if elements == 0 {
        return lines;
    }
    let (lanes, per_cube) = capabilities.lines(PLANES);
    let units = capabilities.cores.unwrap_or(128.min(capabilities.units));
    let (all, ptx) = (heads * rows, capabilities.copy_async);
    let softmaxes = client.empty((all * 8).max(4));
    // SAFETY: planes past the last row and units past the last element return; each reads scores of its head
    // that its rows see, and writes its own numbers.
    unsafe {
        launch!(
            row_softmaxes,
            client,
            cube_count(client, all.div_ceil(per_cube as usize).max(1)),
            CubeDim::new_2d(lanes, per_cube),
            buffer(scores, all * len),
            buffer(&softmaxes, all * 2),
            heads,
            rows,
            len,
            first,
            lanes as usize,
            ptx,
        );
        launch!(
            sums_of_lines,
            client,
            cube_count(client, elements.div_ceil(units as usize)),
            CubeDim::new_1d(units),
            buffer(scores, all * len),
            buffer(&softmaxes, all * 2),
            buffer(&lines.vertical, elements),
            buffer(&lines.slash, elements),
            heads,
            rows,
            len,
            first,
            ptx,
        );
    }
    lines
}

/// The largest score of each row, and one over the sum of exponentials relative to it.
#[cube(launch_unchecked, create_dummy_kernel)]
fn row_softmaxes(
    scores: &[f32],
    softmaxes: &mut [f32],
    heads: usize,
    rows: usize,
    len: usize,
    first: usize,
    #[comptime] lanes: usize,
    #[comptime] ptx: bool,
) {
    let row = CUBE_POS * CUBE_DIM_Y as usize + UNIT_POS_Y as usize;
    if row >= heads * rows {
        terminate!();
    }
    let lane = UNIT_POS_X as usize;
    let seen = len - first - row % rows;
    let start = row * len;
    let step = comptime!(AHEAD * lanes);
    let mut largest = nothing();
    let mut i = lane;
    while i < seen {
        #[unroll]
        for n in 0..comptime!(AHEAD) {
            // The last one again does no harm.
            let at = (i + n * lanes).min(seen - 1);
            largest = largest.max(usable(scores[start + at]));
        }
        i += step;
    }
    if comptime!(lanes > 1) {
        largest = plane_max(largest);
    }
    let base = reference(largest);
    let mut total = 0.0f32;
    let mut i = lane;
    while i < seen {
        #[unroll]
        for n in 0..comptime!(AHEAD) {
            let at = i + n * lanes;
            let weight = share(scores[start + at.min(seen - 1)], base, 1.0f32, ptx);
            total += select(at < seen, weight, 0.0f32);
        }
        i += step;
    }
    if comptime!(lanes > 1) {
        total = plane_sum(total);
    }
    if lane == 0 {
        softmaxes[row * 2] = base;
        softmaxes[row * 2 + 1] = inverse(total);
    }
}

/// A unit for a key, and for a distance.
#[cube(launch_unchecked, create_dummy_kernel)]
fn sums_of_lines(
    scores: &[f32],
    softmaxes: &[f32],
    vertical: &mut [f32],
    slash: &mut [f32],
    heads: usize,
    rows: usize,
    len: usize,
    first: usize,
    #[comptime] ptx: bool,
) {
    let at = ABSOLUTE_POS;
    if at >= heads * len {
        terminate!();
    }
    let (head, own) = (at / len, at % len);
    let mut by_key = 0.0f32;
    let mut by_distance = 0.0f32;
    for r in 0..rows {
        let row = head * rows + r;
        let (base, share_of) = (softmaxes[row * 2], softmaxes[row * 2 + 1]);
        let seen = len - first - r;
        if own < seen {
            by_key += share(scores[row * len + own], base, share_of, ptx);
            by_distance += share(scores[row * len + seen - 1 - own], base, share_of, ptx);
        }
    }
    vertical[at] = by_key;
    slash[at] = by_distance;
}

/// The probability of a score.
#[cube]
fn share(score: f32, base: f32, inverse: f32, #[comptime] ptx: bool) -> f32 {
    exp2((usable(score) - base) * comptime!(std::f32::consts::LOG2_E), ptx) * inverse
}
