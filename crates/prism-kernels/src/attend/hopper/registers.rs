//! The accumulators of a consumer, and the PTX of what is done to them.
//!
//! CubeCL has no operand that is both read and written, which is what `wgmma` accumulates into. So
//! the tiles live in PTX registers with names of their own, declared once a kernel:
//! `out` (O), `score` (S = Q Kᵀ), `weight` (P, two rounded weights a register) and `query` (Q).
//!
//! A thread holds two rows of its warpgroup's 64, 8 apart: element `i` of `out` and `score` lies in
//! row `(i / 2) % 2` and column `8 · (i / 4) + 2 · (lane % 4) + i % 2`. Two neighbouring scores,
//! rounded, are just the A operand of the second product.
//!
//! Of each row: `offset` = −reference in log2 units, what is added to scaled scores before `ex2`;
//! `sum` of the weights in this thread's columns; `shrink`, the factor of a moved reference. Of the
//! warpgroup: `moved`, whether a reference just did. Of the warp: `direct`, whether all its offsets are
//! 0 and products need no factor.

use std::fmt::Write;

use super::HopperShape;
use crate::hopper::wgmma::{list, name};

/// Scores of a thread: 64 rows of 128 keys over 128 threads.
pub(super) const SCORES: usize = 64;

/// 3e38 as the offset of rows that have seen no finite score: the first finite one overflows `ex2`,
/// which moves the reference.
pub(super) const UNSEEN: &str = "0f7F61B1E6";
const NAN: &str = "0f7FC00000";

/// Code on the scores of tile `set` of a pair: those of the second have registers of their own, `other`.
pub(super) fn of(code: String, set: u32) -> String {
    if set == 1 { code.replace("score", "other") } else { code }
}

/// Which of its two rows an element of a thread belongs to.
pub(super) fn row(i: usize) -> usize {
    i / 2 % 2
}

impl HopperShape {
    /// Columns of the second product. The last box of narrower heads is only partly used: `wgmma` counts
    /// columns by eights.
    fn columns(&self) -> usize {
        self.dim
    }

    pub(super) fn outs(&self) -> usize {
        self.columns() / 2
    }

    /// Declares the registers; once, in the kernel's outermost scope.
    pub(super) fn declare(&self) -> String {
        let (outs, queries) = (self.outs(), self.dim / 4);
        let mut s = format!(
            ".reg .f32 out<{outs}>; .reg .f32 score<{SCORES}>; .reg .b32 weight<32>; .reg .b32 \
             query<{queries}>; .reg .f32 offset<2>, sum<2>, shrink<2>; .reg .pred moved, direct;"
        );
        if self.ahead {
            let _ = write!(s, " .reg .f32 other<{SCORES}>;");
        }
        s
    }

    /// An empty row: no output, no weight.
    pub(super) fn clear(&self) -> String {
        let mut s = String::new();
        for i in 0..self.outs() {
            let _ = write!(s, "mov.f32 out{i}, 0f00000000; ");
        }
        for r in 0..2 {
            let _ = write!(s, "mov.f32 sum{r}, 0f00000000; mov.f32 offset{r}, {UNSEEN}; ");
        }
        s
    }

    /// 64 queries from swizzled shared memory. `%0`: this lane's 16 bytes of the first 16 dims.
    pub(super) fn load_queries(&self) -> String {
        let mut s = String::from("{ .reg .b32 a;\n");
        for step in 0..self.dim / 16 {
            let (across, half) = (32 * (step % 4), super::HALF * (step / 4));
            let to = list("query", 4 * step, 4);
            let _ = writeln!(
                s,
                "xor.b32 a, %0, {across}; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{to}}}, \
                 [a+{half}];"
            );
        }
        s.push('}');
        s
    }

    /// Begins S = Q Kᵀ. `keys`, `queries`: operands that hold descriptors; queries in registers need none.
    pub(super) fn score(&self, keys: &str, queries: &str) -> String {
        let t = name(self.element);
        let mut s = String::from("{ .reg .b64 a, b;\nwgmma.fence.sync.aligned;\n");
        for step in 0..self.dim / 16 {
            // In units of 16 bytes: 16 dims, or from one half of the dims to the other.
            let at = step % 4 * 2 + step / 4 * (super::HALF / 16);
            let accumulate = usize::from(step > 0);
            let scores = list("score", 0, SCORES);
            // Neither operand in shared memory is transposed.
            let (a, transposed) = if self.ahead {
                let _ = writeln!(s, "add.s64 a, {queries}, {at};");
                (String::from("a"), "0, 0")
            } else {
                (format!("{{{}}}", list("query", 4 * step, 4)), "0")
            };
            let _ = writeln!(
                s,
                "add.s64 b, {keys}, {at};\nwgmma.mma_async.sync.aligned.m64n128k16.f32.{t}.{t} \
                 {{{scores}}}, {a}, b, {accumulate}, 1, 1, {transposed};"
            );
        }
        s.push_str("wgmma.commit_group.sync.aligned; }\n");
        s
    }

    /// Begins O += P V. `%0`: descriptor of the values.
    pub(super) fn accumulate(&self) -> String {
        let (t, columns) = (name(self.element), self.columns());
        let mut s = String::from("{ .reg .b64 b;\nwgmma.fence.sync.aligned;\n");
        for step in 0..8 {
            // 16 keys of 128 bytes, in units of 16.
            let at = step * 128;
            let (outs, weights) = (list("out", 0, self.outs()), list("weight", 4 * step, 4));
            let _ = writeln!(
                s,
                "add.s64 b, %0, {at};\nwgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{t}.{t} \
                 {{{outs}}}, {{{weights}}}, b, 1, 1, 1, 1;"
            );
        }
        s.push_str("wgmma.commit_group.sync.aligned; }");
        s
    }

    /// NaN for the outputs that see a bad value. `%0`: address of the first bad key of this thread's
    /// first column, `%1`: key that its first query sees last.
    pub(super) fn spoil(&self) -> String {
        let mut s =
            String::from("{ .reg .pred sees; .reg .u32 below, bad<2>;\nadd.u32 below, %1, 8;\n");
        for i in 0..self.outs() {
            if i % 4 == 0 {
                let _ = writeln!(s, "ld.shared.v2.u32 {{bad0, bad1}}, [%0+{}];", 8 * i);
            }
            let (key, bad) = (["%1", "below"][row(i)], i % 2);
            let _ = writeln!(s, "setp.ge.u32 sees, {key}, bad{bad}; @sees mov.f32 out{i}, {NAN};");
        }
        s.push('}');
        s
    }

    /// `%0`..`%3`: eight neighbouring outputs of row `r`, normalised and rounded: those of group
    /// 4 · `quad` + lane % 4, of the groups of 8 columns. `%4`: lane.
    ///
    /// The four lanes of a row each hold two columns of every group; they exchange them, so that each
    /// stores 16 bytes.
    pub(super) fn rounded(&self, quad: usize, r: usize) -> String {
        let t = name(self.element);
        let mut s = String::from(
            "{ .reg .f32 x, y; .reg .b32 w<4>, a<2>, b<2>, t<2>; .reg .pred odd, upper;\n\
             and.b32 t0, %4, 1; setp.ne.u32 odd, t0, 0; and.b32 t0, %4, 2; setp.ne.u32 upper, t0, 0;\n",
        );
        for g in 0..4 {
            let i = 4 * (4 * quad + g) + 2 * r;
            let _ = if i < self.outs() {
                writeln!(
                    s,
                    "mul.f32 x, out{i}, shrink{r}; mul.f32 y, out{}, shrink{r}; \
                     cvt.rn.{t}x2.f32 w{g}, y, x;",
                    i + 1
                )
            } else {
                writeln!(s, "mov.b32 w{g}, 0;")
            };
        }
        // Lanes 1 apart: then `a` is of group lane % 2, `b` of the one two further, half of each.
        for (to, even, odd) in [("a", 0, 1), ("b", 2, 3)] {
            let _ = writeln!(
                s,
                "selp.b32 t0, w{even}, w{odd}, odd; \
                 shfl.sync.bfly.b32 t0, t0, 1, 0x1f, 0xffffffff;\n\
                 selp.b32 {to}0, t0, w{even}, odd; selp.b32 {to}1, w{odd}, t0, odd;"
            );
        }
        // Lanes 2 apart: the other half of one of them.
        for i in 0..2 {
            let _ = writeln!(
                s,
                "selp.b32 t{i}, a{i}, b{i}, upper; \
                 shfl.sync.bfly.b32 t{i}, t{i}, 2, 0x1f, 0xffffffff;"
            );
        }
        for i in 0..2 {
            let _ = writeln!(
                s,
                "selp.b32 %{i}, t{i}, a{i}, upper; selp.b32 %{}, b{i}, t{i}, upper;",
                i + 2
            );
        }
        s.push('}');
        s
    }

    /// Whether 128 threads find NaN or an infinity in a tile of values: `%0`, the same for all. `%1`:
    /// this thread's first 16 bytes, `%2`: named barrier of the warpgroup.
    pub(super) fn find_bad(&self) -> String {
        let t = name(self.element);
        let mut s =
            String::from("{ .reg .b32 v<4>, a<4>, zero; .reg .pred bad;\nmov.b32 zero, 0;\n");
        for e in 0..4 {
            let _ = writeln!(s, "mov.b32 a{e}, 0;");
        }
        for at in (0..self.tile_bytes()).step_by(128 * 16) {
            let _ = writeln!(s, "ld.shared.v4.b32 {{v0, v1, v2, v3}}, [%1+{at}];");
            for e in 0..4 {
                // A product with 0 is NaN for what isn't finite, and stays so.
                let _ = writeln!(s, "fma.rn.{t}x2 a{e}, v{e}, zero, a{e};");
            }
        }
        s.push_str(
            "or.b32 a0, a0, a1; or.b32 a2, a2, a3; or.b32 a0, a0, a2; and.b32 a0, a0, 0x7fff7fff;\n\
             setp.ne.b32 bad, a0, 0; bar.red.or.pred bad, %2, 128, bad; selp.b32 %0, 1, 0, bad; }",
        );
        s
    }
}
