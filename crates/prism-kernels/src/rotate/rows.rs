//! The rows of a block as a unit sees them: what it reads, turns, sums up and writes.

use cubecl::prelude::*;

use super::kernel::RotateShape;

/// The heads of a line, and where its means go.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Heads {
    pub batch: usize,
    pub first: usize,
    /// At most [`RotateShape::heads`].
    pub count: usize,
    /// Line of the means of the first head, and lines to the next head's.
    pub line: usize,
    pub lines: usize,
}

/// Some rows of a block.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Rows {
    /// The first in the tensor that is read, in the one that is written, and its position.
    pub from: usize,
    pub to: usize,
    pub position: usize,
    pub count: usize,
}

/// What a unit does of each row.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Lane {
    pub lane: usize,
    /// Its first row of those of a block.
    pub group: usize,
    /// Vectors of dims; the second is the first where the lane doesn't turn.
    pub first: usize,
    pub second: usize,
}

#[cube]
pub(super) fn lane(lane: usize, group: usize, #[comptime] shape: RotateShape) -> Lane {
    let turning = comptime!(shape.turning);
    let mut first = lane;
    let mut second = lane + turning;
    if comptime!(shape.interleaved) {
        first = 2 * lane;
        second = 2 * lane + 1;
    }
    let still = lane + turning;
    let turns = lane < turning;
    Lane { lane, group, first: select(turns, first, still), second: select(turns, second, still) }
}

#[cube]
pub(super) fn reset<N: Size>(sums: &mut Array<Vector<f32, N>>, #[comptime] shape: RotateShape) {
    #[unroll]
    for i in 0..2 * shape.heads {
        sums[i] = Vector::<f32, N>::new(0.0);
    }
}

/// Steps of a tensor, in vectors.
#[derive(CubeType, Clone, Copy)]
struct Steps {
    batch: usize,
    head: usize,
    row: usize,
    column: usize,
}

#[cube]
impl Steps {
    fn of(batch: usize, head: usize, row: usize, column: usize, #[comptime] width: usize) -> Self {
        Steps { batch: batch / width, head: head / width, row: row / width, column }
    }

    /// Where the `h`th of `heads` begins; past the last one, where that does.
    fn head(&self, heads: &Heads, #[comptime] h: usize) -> usize {
        let head = heads.first + h.runtime().min(heads.count - 1);
        heads.batch * self.batch + head * self.head
    }

    /// From the beginning of a row to a vector of it.
    fn vector(&self, vector: usize, #[comptime] shape: RotateShape) -> usize {
        select(comptime!(shape.dense), vector, vector * self.column)
    }
}

/// Adds rows as they are.
#[cube]
pub(super) fn add_rows<E: Float, N: Size>(
    x: &mut Tensor<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    heads: &Heads,
    rows: &Rows,
    lane: &Lane,
    #[comptime] shape: RotateShape,
) {
    let width = N::value();
    let steps = Steps::of(x.stride(0), x.stride(1), x.stride(2), x.stride(3), width);
    let (first, second) = (steps.vector(lane.first, shape), steps.vector(lane.second, shape));
    let mut row = lane.group;
    while row < rows.count {
        let at = (rows.from + row) * steps.row;
        #[unroll]
        for h in 0..shape.heads {
            let at = at + steps.head(heads, h);
            sums[2 * h] += Vector::cast_from(x[at + first]);
            sums[2 * h + 1] += Vector::cast_from(x[at + second]);
        }
        row += comptime!(shape.groups);
    }
}

/// Rotates and adds rows.
#[cube]
pub(super) fn rotate_rows<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    new: &mut Tensor<Vector<E, N>>,
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    sums: &mut Array<Vector<f32, N>>,
    heads: &Heads,
    rows: &Rows,
    lane: &Lane,
    factor: f32,
    #[comptime] scaled: bool,
    #[comptime] shape: RotateShape,
) {
    let width = N::value();
    let turning = comptime!(shape.turning);
    let all_turn = comptime!(2 * turning * width == shape.dim);
    let interleaved = comptime!(shape.interleaved);
    let steps = Steps::of(x.stride(0), x.stride(1), x.stride(2), x.stride(3), width);
    let (first, second) = (steps.vector(lane.first, shape), steps.vector(lane.second, shape));
    let new_steps = Steps::of(new.stride(0), new.stride(1), new.stride(2), new.stride(3), width);
    let new_first = new_steps.vector(lane.first, shape);
    let new_second = new_steps.vector(lane.second, shape);
    let turns = lane.lane < turning;
    let factor = Vector::<f32, N>::new(factor);
    let mut row = lane.group;
    while row < rows.count {
        // All loads of a row are under way before the first is needed.
        let mut loaded = Array::<Vector<E, N>>::new(comptime!(2 * shape.heads));
        let at = (rows.from + row) * steps.row;
        #[unroll]
        for h in 0..shape.heads {
            let at = at + steps.head(heads, h);
            loaded[2 * h] = x[at + first];
            loaded[2 * h + 1] = x[at + second];
        }
        let mut c = Vector::<f32, N>::new(1.0);
        let mut s = Vector::<f32, N>::new(0.0);
        if comptime!(turning > 0) {
            // Lanes that don't turn read what is there for another.
            let angle =
                (rows.position + row) * turning + lane.lane.min(comptime!(turning.max(1) - 1));
            c = cos[angle];
            s = sin[angle];
        }
        let to = (rows.to + row) * new_steps.row;
        #[unroll]
        for h in 0..shape.heads {
            let a = Vector::<f32, N>::cast_from(loaded[2 * h]);
            let b = Vector::<f32, N>::cast_from(loaded[2 * h + 1]);
            let mut turned_a = a;
            let mut turned_b = b;
            if all_turn || turns {
                if interleaved {
                    let x = every_other::<N>(a, b, 0usize);
                    let y = every_other::<N>(a, b, 1usize);
                    let new_x = x * c - y * s;
                    let new_y = x * s + y * c;
                    turned_a = woven::<N>(new_x, new_y, 0usize);
                    turned_b = woven::<N>(new_x, new_y, 1usize);
                } else {
                    turned_a = a * c - b * s;
                    turned_b = a * s + b * c;
                }
            }
            let mut stored_a = Vector::<E, N>::cast_from(turned_a);
            let mut stored_b = Vector::<E, N>::cast_from(turned_b);
            sums[2 * h] += Vector::cast_from(stored_a);
            sums[2 * h + 1] += Vector::cast_from(stored_b);
            if scaled {
                stored_a = Vector::<E, N>::cast_from(turned_a * factor);
                stored_b = Vector::<E, N>::cast_from(turned_b * factor);
            }
            if h < heads.count {
                let to = to + new_steps.head(heads, h);
                new[to + new_first] = stored_a;
                if all_turn || turns {
                    new[to + new_second] = stored_b;
                }
            }
        }
        row += comptime!(shape.groups);
    }
}

/// Every other element of `a` and then of `b`, from element `start` on.
#[cube]
fn every_other<N: Size>(
    a: Vector<f32, N>,
    b: Vector<f32, N>,
    #[comptime] start: usize,
) -> Vector<f32, N> {
    let width = N::value();
    let mut out = a;
    if comptime!(width == 1) {
        if comptime!(start == 1) {
            out = b;
        }
    } else {
        #[unroll]
        for i in 0..width {
            let e = comptime!(2 * i + start);
            if comptime!(e < width) {
                out.insert(i, a.extract(e));
            } else {
                out.insert(i, b.extract(comptime!(e - width)));
            }
        }
    }
    out
}

/// Elements of `x` and `y` in turns: of the two vectors that they fill the one at `half`.
#[cube]
fn woven<N: Size>(x: Vector<f32, N>, y: Vector<f32, N>, #[comptime] half: usize) -> Vector<f32, N> {
    let width = N::value();
    let mut out = x;
    if comptime!(width == 1) {
        if comptime!(half == 1) {
            out = y;
        }
    } else {
        #[unroll]
        for i in 0..width {
            let from = comptime!((half * width + i) / 2);
            if comptime!(i % 2 == 0) {
                out.insert(i, x.extract(from));
            } else {
                out.insert(i, y.extract(from));
            }
        }
    }
    out
}

/// Writes 0 to the rows before `first` and from `first + count` on: this line's share of them, the
/// `part`th of `parts`.
#[cube]
pub(super) fn clear<E: Float, N: Size>(
    new: &mut Tensor<Vector<E, N>>,
    heads: &Heads,
    first: usize,
    count: usize,
    part: usize,
    parts: usize,
    #[comptime] shape: RotateShape,
) {
    let width = N::value();
    let vectors = comptime!(shape.dim / width);
    let steps = Steps::of(new.stride(0), new.stride(1), new.stride(2), new.stride(3), width);
    let mut unit = 0usize;
    let mut units = 1usize;
    if comptime!(!shape.alone) {
        unit = UNIT_POS as usize;
        units = comptime!(shape.units as usize);
    }
    let outside = new.shape(2) - count;
    let mut i = part;
    while i < outside {
        let row = select(i < first, i, i + count);
        #[unroll]
        for h in 0..shape.heads {
            let at = steps.head(heads, h) + row * steps.row;
            let mut vector = unit;
            while vector < vectors {
                new[at + steps.vector(vector, shape)] = Vector::<E, N>::new(E::from_int(0));
                vector += units;
            }
        }
        i += parts;
    }
}
