//! The PTX of a consumer: the products, and what becomes of its accumulators, which are laid out as
//! [`wgmma`](crate::hopper::wgmma) says.
//!
//! Eight rows of 8 columns are one matrix of `stmatrix` and `ldmatrix`, whose lanes hold just what the
//! accumulators of such 8 columns hold. A box of 64 columns takes four times four matrices: 16 rows of a
//! warp and 16 columns each. Across the swizzle, 16 columns further is an `xor`.

use std::fmt::Write;

use super::launch::{BOX_COLUMNS, COLUMNS, End, MatmulShape, STEP};
use super::matrix::Layout;
use crate::hopper::wgmma::{list, name};
use crate::operand::Element;

/// Accumulators of a thread: 64 rows of 256 columns over 128 threads.
const ACCUMULATORS: usize = COLUMNS / 2;
/// −log₂ e, and 1.
const MINUS_LOG2_E: &str = "0fBFB8AA3B";
const ONE: &str = "0f3F800000";

impl MatmulShape {
    /// Declares the accumulators; once, in the kernel's outermost scope.
    pub(super) fn declare(&self) -> String {
        format!(".reg .f32 acc<{ACCUMULATORS}>;")
    }

    /// Begins the products of a step. `%0`, `%1`: descriptors of X and W; `%2`: 0 where the accumulators
    /// hold nothing yet.
    pub(super) fn multiply(&self) -> String {
        let (t, acc) = (name(self.element), list("acc", 0, ACCUMULATORS));
        // In units of 16 bytes: 16 steps of K, along rows or across them.
        let (along, transposed) = match self.w {
            Layout::ColumnMajor => (2, 0),
            Layout::RowMajor => (128, 1),
        };
        let mut s = String::from(
            "{ .reg .b64 x, w; .reg .pred more;\nsetp.ne.b32 more, %2, 0;\n\
             wgmma.fence.sync.aligned;\n",
        );
        for i in 0..STEP / 16 {
            let accumulate = if i == 0 { "more" } else { "1" };
            let _ = writeln!(
                s,
                "add.s64 x, %0, {}; add.s64 w, %1, {};\n\
                 wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.{t}.{t} {{{acc}}}, x, w, \
                 {accumulate}, 1, 1, 0, {transposed};",
                2 * i,
                along * i
            );
        }
        s.push_str("wgmma.commit_group.sync.aligned; }");
        s
    }

    /// Leaves box `i` of the output where it is staged. `%0`: address of this lane's first 8 columns; the
    /// residual, if there is one, is there.
    pub(super) fn stage_box(&self, i: usize) -> String {
        let t = name(self.element);
        let mut s =
            String::from("{ .reg .b32 a, r<4>, h<4>; .reg .f32 v<8>, e<4>; .reg .b16 low, high;\n");
        for quarter in 0..4 {
            // The first of two neighbouring groups of 8 columns.
            let group = (i * BOX_COLUMNS + 16 * quarter) / 8;
            let _ = writeln!(s, "xor.b32 a, %0, {};", 32 * quarter);
            if self.end == End::Residual {
                s.push_str("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r0, r1, r2, r3}, [a];\n");
            }
            for half in 0..2 {
                self.values(&mut s, group + half, half);
            }
            for pair in 0..4 {
                let (low, high) = (2 * pair, 2 * pair + 1);
                let _ = writeln!(s, "cvt.rn.{t}x2.f32 h{pair}, v{high}, v{low};");
            }
            s.push_str("stmatrix.sync.aligned.m8n8.x4.shared.b16 [a], {h0, h1, h2, h3};\n");
        }
        s.push('}');
        s
    }

    /// What is rounded of a group of 8 columns of the output, into `v0..v3` or `v4..v7`.
    fn values(&self, s: &mut String, group: usize, half: usize) {
        for k in 0..4 {
            let to = 4 * half + k;
            match self.end {
                End::Plain => {
                    let _ = writeln!(s, "mov.f32 v{to}, acc{};", 4 * group + k);
                }
                End::Residual => {
                    if k % 2 == 0 {
                        self.unpack(s, 2 * half + k / 2, to);
                    }
                    let _ = writeln!(s, "add.f32 v{to}, v{to}, acc{};", 4 * group + k);
                }
                End::SwiGlu => {
                    // Of the weight's groups every other is of the gate.
                    let (gate, up) = (8 * group + k, 8 * group + 4 + k);
                    let _ = writeln!(
                        s,
                        "mul.f32 e{k}, acc{gate}, {MINUS_LOG2_E}; ex2.approx.ftz.f32 e{k}, e{k};\n\
                         add.f32 e{k}, e{k}, {ONE}; rcp.approx.ftz.f32 e{k}, e{k};\n\
                         mul.f32 e{k}, e{k}, acc{gate}; mul.f32 v{to}, e{k}, acc{up};"
                    );
                }
            }
        }
    }

    /// Two neighbouring elements of the residual, from `r{from}` to `v{to}` and the one after it.
    fn unpack(&self, s: &mut String, from: usize, to: usize) {
        let next = to + 1;
        let _ = match self.element {
            Element::BF16 => {
                writeln!(s, "shl.b32 v{to}, r{from}, 16; and.b32 v{next}, r{from}, 0xffff0000;")
            }
            _ => writeln!(
                s,
                "mov.b32 {{low, high}}, r{from}; cvt.f32.f16 v{to}, low; cvt.f32.f16 v{next}, high;"
            ),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(end: End) -> MatmulShape {
        let (element, w) = (Element::BF16, Layout::ColumnMajor);
        MatmulShape { element, w, end, cluster: 2, bounded: false }
    }

    /// Every accumulator is read in some box: a SwiGLU's gates twice, for the exponent and the product.
    #[test]
    fn boxes_take_all_accumulators() {
        for end in [End::Plain, End::Residual, End::SwiGlu] {
            let shape = shape(end);
            let text: String = (0..shape.out_boxes()).map(|i| shape.stage_box(i)).collect();
            for i in 0..ACCUMULATORS {
                let gate = end == End::SwiGlu && i / 4 % 2 == 0;
                let found = [",", ";"].map(|end| text.matches(&format!("acc{i}{end}")).count());
                let expected = if gate { 2 } else { 1 };
                assert_eq!(found.iter().sum::<usize>(), expected, "{end:?} acc{i}");
            }
        }
    }

    /// The gate and the up projection of an output are in the same two columns of neighbouring groups.
    #[test]
    fn a_gate_meets_its_up_projection() {
        use super::super::{Half, interleaved};
        let column = |accumulator: usize, pair: usize| 8 * (accumulator / 4) + pair;
        for group in 0..COLUMNS / 16 {
            for pair in 0..8 {
                let gate = interleaved(column(8 * group, pair));
                let up = interleaved(column(8 * group + 4, pair));
                assert_eq!((gate.0, up.0), (Half::Gate, Half::Up));
                assert_eq!((gate.1, up.1), (8 * group + pair, 8 * group + pair));
            }
        }
    }
}
