//! The whole of a sparse call, of its parts.

use serde::Serialize;

use super::{PARTS, Record, Run, SECOND_ORDER, digits, tokens};

/// A sparse call, and the dense attention in its place: the fastest of our own records of each.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Whole {
    /// Element type.
    pub dtype: String,
    /// Tokens.
    pub tokens: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Share of the causal blocks that is read.
    pub density: f64,
    /// Milliseconds of each of [`PARTS`], sustained.
    pub parts: [f64; PARTS.len()],
    /// Milliseconds of all of them.
    pub ms: f64,
    /// Milliseconds of our own dense attention, where it was timed.
    pub dense_ms: Option<f64>,
    /// Milliseconds that pooling adds to the rotary embedding in whose launch it is done, where both were
    /// timed: what `pool` costs where Q and K come without their rotary embedding.
    pub pool_with_rotate_ms: Option<f64>,
}

impl Whole {
    /// How many times as long dense attention takes.
    pub fn speedup(&self) -> Option<f64> {
        self.dense_ms.map(|dense| dense / self.ms)
    }
}

impl std::fmt::Display for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { dtype, head_dim, density, parts, ms, .. } = self;
        write!(f, "{} tokens, d={head_dim}, {dtype}, ", tokens(self.tokens))?;
        write!(f, "density {}: whole Prism = {}", digits(*density), PARTS.join(" + "))?;
        write!(f, " = {} = {} ms", parts.map(digits).join(" + "), digits(*ms))?;
        if let (Some(dense), Some(times)) = (self.dense_ms, self.speedup()) {
            write!(f, " against own dense {} ms: × {}", digits(dense), digits(times))?;
        }
        match self.pool_with_rotate_ms {
            Some(ms) => write!(f, "; pool while rotating adds {} ms", digits(ms)),
            None => Ok(()),
        }
    }
}

impl Run {
    /// Of every shape and density whose parts were all timed.
    pub fn wholes(&self) -> Vec<Whole> {
        let mut wholes: Vec<Whole> = Vec::new();
        let sparse = |record: &&Record| !record.peer && record.what == "attend";
        for attend in self.sorted().into_iter().filter(sparse) {
            if let Some(whole) = self.whole(attend)
                && !wholes.contains(&whole)
            {
                wholes.push(whole);
            }
        }
        wholes
    }

    /// Of the shape and the density of one record.
    pub(super) fn whole(&self, attend: &Record) -> Option<Whole> {
        let fastest = |what: &str| {
            let ours = self.records.iter().filter(|record| {
                let counts = record.density == attend.density || what != "attend";
                let shape = record.same_shape(attend) && counts;
                shape && !record.peer && record.what == what && record.rung != SECOND_ORDER
            });
            ours.map(|record| record.ms).min_by(f64::total_cmp)
        };
        let parts = PARTS.map(fastest);
        if parts.contains(&None) {
            return None;
        }
        let parts = parts.map(Option::unwrap_or_default);
        Some(Whole {
            dtype: attend.dtype.clone(),
            tokens: attend.kv_len,
            head_dim: attend.head_dim,
            density: attend.density,
            parts,
            ms: parts.iter().sum(),
            dense_ms: fastest("dense"),
            pool_with_rotate_ms: fastest("rotate-pool").zip(fastest("rotate")).map(|(a, b)| a - b),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{record, run};
    use super::*;

    #[test]
    fn a_whole_is_the_fastest_of_each_part() {
        let mut records = vec![
            record("pool", "plane", 8192, 0.25),
            record("pool", SECOND_ORDER, 8192, 0.125),
            record("calibrate", "unit", 8192, 0.25),
            record("select", "plane", 8192, 0.75),
            record("select", "mma", 8192, 0.5),
            record("schedule", "unit", 8192, 0.25),
            record("attend", "mma", 8192, 3.0),
            record("attend", "hopper", 8192, 1.75),
            record("dense", "hopper", 8192, 12.0),
            record("attend", "hopper", 16384, 4.0),
        ];
        let wholes = run(records.clone()).wholes();
        assert_eq!(wholes.len(), 1, "the longer prompt lacks parts");
        assert_eq!((wholes[0].ms, wholes[0].speedup()), (3.0, Some(4.0)));
        let says = wholes[0].to_string();
        assert!(
            says.contains("8K tokens") && says.ends_with("own dense 12.0 ms: × 4.00"),
            "{says}"
        );
        records.retain(|record| record.what != "dense");
        let rotations = [("rotate", 0.5), ("rotate-pool", 0.625)];
        records.extend(rotations.map(|(what, ms)| record(what, "plane", 8192, ms)));
        let whole = &run(records).wholes()[0];
        assert_eq!((whole.speedup(), whole.pool_with_rotate_ms), (None, Some(0.125)));
        assert!(whole.to_string().ends_with("pool while rotating adds 0.125 ms"), "{whole}");
    }
}
