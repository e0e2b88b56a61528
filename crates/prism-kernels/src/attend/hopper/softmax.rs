//! The PTX of the softmax: from scores to weights, in the registers of [`registers`](super::registers).
//!
//! No running maximum is kept: weights are 2^(score · scale + offset) against a reference of the row,
//! which its first tile sets and only an overflow moves. It cancels in the end.
//!
//! Where Q is pre-scaled, so that products are scores in log2 units, a warp whose rows all begin near 0
//! takes 0 as their reference: then the weight of a product is `ex2` of it and nothing else.

use std::fmt::Write;

use super::HopperShape;
use super::registers::{SCORES, UNSEEN, row};
use crate::hopper::wgmma::name;
use crate::operand::Element;

const MINUS_INFINITY: &str = "0fFF800000";

/// Element number `k` of the thread's 32 in a row.
fn element(row: usize, k: usize) -> usize {
    4 * (k / 2) + 2 * row + k % 2
}

impl HopperShape {
    /// What a thread's sum over a tile may reach before the reference moves. bf16 has the exponents
    /// of f32: weights up to 2⁶⁰ lose nothing. f16 ends at 65504.
    fn threshold(&self) -> &'static str {
        match self.element {
            Element::BF16 => "0f5D800000",
            _ => "0f47000000",
        }
    }

    /// Exponents up to which 32 weights stay below [`threshold`](Self::threshold).
    ///
    /// A maximum times the scale is rounded, down, so that the exponent of the maximum is the rounding
    /// error: next to nothing, unless scores are beyond 10⁸, as large halves make them. Even then the
    /// weights stay finite and the sum isn't 0.
    fn most(&self) -> &'static str {
        match self.element {
            Element::BF16 => "0f425C0000",
            _ => "0f41200000",
        }
    }

    /// Maxima of the first tile, in log2 units, between which 0 does for the reference: below the
    /// first and the largest weights are too small, above the second they may exceed
    /// [`threshold`](Self::threshold) soon.
    ///
    /// In bf16 weights from 2⁻¹²⁶ to 2⁶⁰ are as good as any: 40 to both sides leaves room. f16 ends at
    /// 2¹⁶, and 32 weights of 2⁹ stay below the threshold. At the other end it loses bits below 2⁻¹⁴
    /// and everything below 2⁻²⁵: a maximum of 2⁻⁴ keeps all bits of the weights down to 2⁻¹⁰ of it.
    fn near_zero(&self) -> [&'static str; 2] {
        match self.element {
            Element::BF16 => ["0fC2200000", "0f42200000"],
            _ => ["0fC0800000", "0f41100000"],
        }
    }

    /// Hides keys after their query. `%0`: key that the thread's first query sees last, less its
    /// first column.
    pub(super) fn mask(&self) -> String {
        let mut s = String::from("{ .reg .pred hidden; .reg .s32 below;\nadd.s32 below, %0, 8;\n");
        for i in 0..SCORES {
            let column = 8 * (i / 4) + i % 2;
            let sees = ["%0", "below"][row(i)];
            let _ = writeln!(
                s,
                "setp.lt.s32 hidden, {sees}, {column}; selp.f32 score{i}, {MINUS_INFINITY}, \
                 score{i}, hidden;"
            );
        }
        s.push('}');
        s
    }

    /// Weights of a row's first tile, against its maximum, or 0. `%0`: scale · log2 e, 1 if Q has it.
    pub(super) fn first_softmax(&self) -> String {
        let mut s = String::from("{ .reg .f32 t, m<4>, u<4>;\n");
        maxima(&mut s);
        for r in 0..2 {
            let _ = writeln!(
                s,
                "mul.rm.f32 t, m{r}, %0; neg.f32 t, t; min.f32 offset{r}, t, {UNSEEN};"
            );
        }
        if self.prescaled {
            // NaN and −∞ are not near 0.
            let [low, high] = self.near_zero();
            let _ = writeln!(
                s,
                "{{ .reg .pred near;\n\
                 setp.ge.f32 near, m0, {low}; setp.le.and.f32 near, m0, {high}, near;\n\
                 setp.ge.and.f32 near, m1, {low}, near; setp.le.and.f32 near, m1, {high}, near;\n\
                 vote.sync.all.pred direct, near, 0xffffffff; }}\n\
                 @direct mov.f32 offset0, 0f00000000; @direct mov.f32 offset1, 0f00000000;"
            );
        }
        weigh(&mut s, Some(self.most()));
        add_up(&mut s);
        s.push_str("mov.f32 sum0, u0; mov.f32 sum1, u1; }");
        s
    }

    /// Weights of a further tile, in place of its scores. `%0`: scale · log2 e, 1 if Q has it, `%1`:
    /// named barrier of the warpgroup, `%2` and `%3`: descriptors of the keys and queries. Where
    /// tiles are scored ahead `%4` is 0 for a tile that doesn't count, otherwise 1.
    ///
    /// No maximum is taken: weights are against the old reference, and the sum, which is needed
    /// anyway, tells where one overflows. Then, which is rare, the warpgroup scores the tile again,
    /// since its scores are overwritten, and moves the reference to the new maximum. A NaN compares
    /// false: it stays in the sum, and nothing is done twice for it.
    ///
    /// The barrier makes the decision the warpgroup's, as `wgmma` needs. It also keeps the assembler
    /// from moving the wait for O, which follows, above the exponentials.
    pub(super) fn softmax(&self) -> String {
        let limit = self.threshold();
        let mut s = String::from("{ .reg .f32 t, m<4>, u<4>; .reg .pred over;\n");
        if self.prescaled {
            s.push_str("@!direct bra OFFSET;\n");
            for i in 0..SCORES {
                let _ = writeln!(s, "ex2.approx.ftz.f32 score{i}, score{i};");
            }
            add_up(&mut s);
            s.push_str("bra WEIGHED;\nOFFSET:\n");
        }
        weigh(&mut s, None);
        add_up(&mut s);
        if self.prescaled {
            s.push_str("WEIGHED:\n");
        }
        let _ = writeln!(
            s,
            "setp.gt.f32 over, u0, {limit}; setp.gt.or.f32 over, u1, {limit}, over;\n\
             bar.red.or.pred moved, %1, 128, over;\n@!moved bra KEPT;"
        );
        s.push_str(&self.score("%2", "%3"));
        s.push_str("wgmma.wait_group.sync.aligned 0;\n");
        maxima(&mut s);
        for r in 0..2 {
            let _ = writeln!(
                s,
                "mul.rm.f32 t, m{r}, %0; neg.f32 t, t; min.f32 t, t, offset{r};\n\
                 sub.f32 shrink{r}, t, offset{r}; ex2.approx.ftz.f32 shrink{r}, shrink{r};\n\
                 mov.f32 offset{r}, t;"
            );
        }
        if self.ahead {
            // No product is under way here. Elsewhere, beside one, this would break the pipeline.
            self.shrink_outs(&mut s);
        }
        weigh(&mut s, Some(self.most()));
        add_up(&mut s);
        if self.prescaled {
            s.push_str("setp.ne.u32 direct, %1, %1;\n");
        }
        let keep = if self.ahead { "mul.f32 u0, u0, %4; mul.f32 u1, u1, %4;" } else { "" };
        let _ = write!(
            s,
            "{keep} fma.rn.f32 sum0, sum0, shrink0, u0; fma.rn.f32 sum1, sum1, shrink1, u1;\n\
             bra DONE;\nKEPT: {keep} add.f32 sum0, sum0, u0; add.f32 sum1, sum1, u1;\nDONE: }}",
        );
        s
    }

    /// Brings O to a moved reference. The branch also keeps the assembler from rounding weights
    /// before the wait for O, for which it has no registers.
    pub(super) fn rescale(&self) -> String {
        let mut s = String::from("{\n@!moved bra KEPT;\n");
        self.shrink_outs(&mut s);
        s.push_str("KEPT:\n}");
        s
    }

    fn shrink_outs(&self, s: &mut String) {
        for i in 0..self.outs() {
            let _ = writeln!(s, "mul.f32 out{i}, out{i}, shrink{};", row(i));
        }
    }

    /// Rounds the weights for the second product.
    pub(super) fn round_weights(&self) -> String {
        let t = name(self.element);
        let round = |i| format!("cvt.rn.{t}x2.f32 weight{i}, score{}, score{};", 2 * i + 1, 2 * i);
        (0..SCORES / 2).map(round).collect::<Vec<_>>().join("\n")
    }

    /// Rounds the weights of a tile that may not count: then `%0` is 0, otherwise all ones.
    pub(super) fn round_if(&self) -> String {
        let keep = |i| format!("and.b32 weight{i}, weight{i}, %0;");
        self.round_weights() + &(0..SCORES / 2).map(keep).collect::<String>()
    }

    /// Sums of whole rows, and their inverses in place of `shrink`: 0 for an empty row. `%0`..`%3`:
    /// sums and offsets.
    pub(super) fn finish(&self) -> String {
        let mut s = String::from("{ .reg .f32 t; .reg .pred empty;\n");
        for r in 0..2 {
            for apart in [1, 2] {
                let _ = writeln!(
                    s,
                    "shfl.sync.bfly.b32 t, sum{r}, {apart}, 0x1f, 0xffffffff; add.f32 sum{r}, \
                     sum{r}, t;"
                );
            }
            let _ = writeln!(
                s,
                "rcp.approx.ftz.f32 shrink{r}, sum{r}; setp.eq.f32 empty, sum{r}, 0f00000000; \
                 selp.f32 shrink{r}, 0f00000000, shrink{r}, empty;\nmov.f32 %{r}, sum{r}; \
                 mov.f32 %{}, offset{r};",
                r + 2
            );
        }
        s.push('}');
        s
    }
}

/// `m0`, `m1`: maxima of both rows over the quad that shares them. Two chains a row.
fn maxima(s: &mut String) {
    for k in (2..32).step_by(2) {
        for r in 0..2 {
            for chain in 0..2 {
                let (m, next) = (2 * r + chain, element(r, k + chain));
                let old =
                    if k == 2 { format!("score{}", element(r, chain)) } else { format!("m{m}") };
                let _ = writeln!(s, "max.f32 m{m}, {old}, score{next};");
            }
        }
    }
    s.push_str("max.f32 m0, m0, m1; max.f32 m1, m2, m3;\n");
    for r in 0..2 {
        for apart in [1, 2] {
            let _ = writeln!(
                s,
                "shfl.sync.bfly.b32 t, m{r}, {apart}, 0x1f, 0xffffffff; max.f32 m{r}, m{r}, t;"
            );
        }
    }
}

/// 2^(score · scale + offset) in place of the scores. Where the reference was just set no exponent should
/// exceed 0 by much, and none exceeds `most`.
fn weigh(s: &mut String, most: Option<&str>) {
    for i in 0..SCORES {
        let r = row(i);
        let _ = writeln!(s, "fma.rn.f32 t, score{i}, %0, offset{r};");
        if let Some(most) = most {
            let _ = writeln!(s, "min.NaN.f32 t, t, {most};");
        }
        let _ = writeln!(s, "ex2.approx.ftz.f32 score{i}, t;");
    }
}

/// `u0`, `u1`: sums of the weights of both rows. Two chains a row.
fn add_up(s: &mut String) {
    for k in (2..32).step_by(2) {
        for r in 0..2 {
            for chain in 0..2 {
                let (u, next) = (2 * r + chain, element(r, k + chain));
                let old =
                    if k == 2 { format!("score{}", element(r, chain)) } else { format!("u{u}") };
                let _ = writeln!(s, "add.f32 u{u}, {old}, score{next};");
            }
        }
    }
    s.push_str("add.f32 u0, u0, u1; add.f32 u1, u2, u3;\n");
}
