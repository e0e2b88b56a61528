//! Cases small enough to work out on paper.

use prism_core::selectors::{Lsh, MInference, MeanPool, Prism, XAttention};
use prism_core::{Rope, SelectionRule, SelectorConfig};

use crate::support::{Problem, bare, noise};

/// One query head of one dim, in blocks of 2.
fn line(q: &[f32], k: &[f32]) -> Problem {
    let mut problem = Problem::new(2, &[(q.len(), k.len())], (1, 1), 1, 0);
    (problem.q, problem.k) = (q.to_vec(), k.to_vec());
    problem
}

fn last_row(problem: &Problem, selector: &impl prism_core::selectors::Selector) -> Vec<usize> {
    let row = problem.grids[0].rows() - 1;
    problem.select(selector).blocks(0, 0, row).collect()
}

/// Means of ln 1, ln 4, ln 2, ln 1 weigh 1 : 4 : 2 : 1.
#[test]
fn mean_pool_weighs_means() {
    let ln = |x: f32| x.ln();
    let k = [ln(1.0), ln(1.0), 0.0, 2.0 * ln(4.0), ln(2.0), ln(2.0), 1.0, -1.0];
    let problem = line(&[1.0; 8], &k);
    let of = |mass: f64| last_row(&problem, &MeanPool { mass: Some(mass) });
    assert_eq!(of(0.49), [1]);
    assert_eq!(of(0.51), [1, 2]);
    assert_eq!(of(0.76), [0, 1, 2]);
    assert_eq!(of(0.9), [0, 1, 2, 3]);
}

/// XAttention in tiles of 4: the antidiagonal of the tile (group 1, group 0) holds q₇k₀ + q₆k₁ +
/// q₅k₂ + q₄k₃; only the product of q₇ and k₀ is not 0.
#[test]
fn xattention_sees_the_antidiagonal() {
    let mut problem = Problem::new(4, &[(12, 12)], (1, 1), 1, 0);
    problem.q = vec![0.0; 12];
    problem.k = vec![0.0; 12];
    // Of row 2: q₁₁ meets k₀ and k₄ on antidiagonals, but not k₁ or k₅.
    problem.q[11] = 4.0;
    (problem.k[0], problem.k[5]) = (2f32.ln(), 100.0);
    // Scores q·k/4: ln 2 of block 0, 0 of the others: masses 1/2, 1/4, 1/4.
    let of = |threshold: f64| last_row(&problem, &XAttention { stride: 4, threshold });
    assert_eq!(of(0.49), [0]);
    assert_eq!(of(0.51), [0, 1]);
    assert_eq!(of(0.76), [0, 1, 2]);
    // The diagonal goes first if it is forced: 1/4 is enough for 1/4, not for more.
    let forced = |threshold: f64| {
        use prism_core::selectors::Selector;
        let rule = SelectionRule { recent_blocks: 1, ..bare() };
        let selection = XAttention { stride: 4, threshold }.select(&problem.input(rule)).unwrap();
        selection.blocks(0, 0, 2).collect::<Vec<_>>()
    };
    assert_eq!(forced(0.24), [2]);
    assert_eq!(forced(0.26), [0, 2]);
    assert_eq!(forced(0.76), [0, 1, 2]);
}

/// A loud key in the middle is a column: every row from its block on reads that.
#[test]
fn minference_keeps_a_loud_column() {
    let len = 1024;
    let mut problem = Problem::new(32, &[(len, len)], (1, 1), 2, 0);
    problem.q.fill(1.0);
    problem.k.fill(0.0);
    problem.k[2 * 500..2 * 501].fill(9.0);
    let selector = MInference { vertical: Some(31), slash: Some(100), ..Default::default() };
    let selection = problem.select(&selector);
    for row in 0..32 {
        // First columns, the loud one in block 15, and 100 diagonals: up to 4 blocks back.
        let expected: Vec<usize> =
            (0..=row).filter(|&v| v == 0 || v == 15 || row - v <= 4).collect();
        assert_eq!(selection.blocks(0, 0, row).collect::<Vec<_>>(), expected, "row {row}");
    }
}

#[test]
fn minference_s_adaptive_budget_is_a_share_of_the_length() {
    let adaptive = MInference { adaptive: Some(0.1), ..Default::default() };
    assert_eq!(adaptive.budget(100_000), (2000, 8000));
    assert_eq!(adaptive.budget(1000), (30, 80));
    assert_eq!(adaptive.budget(20), (20, 20));
    assert_eq!(MInference::default().budget(100_000), (1000, 6096));
}

/// Vectors that point the same way share every bucket, opposite ones none.
#[test]
fn lsh_buckets_are_directions() {
    let mut problem = Problem::new(2, &[(8, 8)], (1, 1), 4, 0);
    let direction = noise(4, 9);
    for (j, key) in problem.k.chunks_exact_mut(4).enumerate() {
        // Blocks: along, against, twice along, along.
        let by = [1.0, -1.0, 2.0, 1.0][j / 2];
        key.iter_mut().zip(&direction).for_each(|(x, y)| *x = y * by);
    }
    for query in problem.q.chunks_exact_mut(4) {
        query.copy_from_slice(&direction);
    }
    for seed in 0..20 {
        assert_eq!(last_row(&problem, &Lsh { buckets: 64, rounds: 3, seed }), [0, 2, 3]);
    }
}

#[test]
fn lsh_s_directions_are_normal_and_seeded() {
    let of = |seed| Lsh { buckets: 100, rounds: 10, seed }.directions(64);
    let (a, b) = (of(0), of(1));
    assert_eq!(a, of(0));
    assert_ne!(a, b);
    assert_eq!(a.len(), 10 * 50 * 64);
    let moment = |power: i32| a.iter().map(|x| x.powi(power)).sum::<f32>() / a.len() as f32;
    assert!(moment(1).abs() < 0.02, "{}", moment(1));
    assert!((moment(2) - 1.0).abs() < 0.03, "{}", moment(2));
    assert!((moment(4) - 3.0).abs() < 0.2, "{}", moment(4));
}

/// In parts of 16, a block of 32 has the mass of its two key parts, averaged over two query parts. To the
/// last query part, four key parts weigh 1 : 3 : 2 : 4; to the one before, which sees three, the same.
#[test]
fn prism_adds_up_the_masses_of_parts() {
    let ln = |x: f32| x.ln();
    let mut problem = Problem::new(32, &[(64, 64)], (1, 1), 1, 0);
    let part = |of: [f32; 4]| of.into_iter().flat_map(|x| [x; 16]).collect::<Vec<f32>>();
    problem.k = part([ln(1.0), ln(3.0), ln(2.0), ln(4.0)]);
    // Row 1 has parts 2 and 3: 1/3 each of three keys, then tenths of four.
    problem.q = part([0.0, 0.0, 0.0, 1.0]);
    // Block 0: (2/3 + 4/10) / 2 = .533; block 1: (1/3 + 6/10) / 2 = .467.
    let of = |mass| {
        let selector = Prism {
            mass: Some(mass),
            calibration: prism_core::Calibration::Off,
            pool_block: Some(16),
            ..Prism::default()
        };
        last_row(&problem, &selector)
    };
    assert_eq!(of(0.53), [0]);
    assert_eq!(of(0.54), [0, 1]);
    let whole = |mass| last_row(&problem, &MeanPool { mass: Some(mass) });
    // Of means of whole blocks the nearer one is the heavier.
    assert_eq!(whole(0.5), [1]);
}

#[test]
fn parts_fit_the_block() {
    let problem = Problem::new(48, &[(100, 100)], (1, 1), 16, 7);
    let of = |pool_block| {
        use prism_core::selectors::Selector;
        Prism { pool_block: Some(pool_block), ..Prism::default() }.select(&problem.input(bare()))
    };
    assert!(of(16).is_ok() && of(48).is_ok());
    for bad in [0, 8, 32, 96] {
        let error = of(bad).unwrap_err().to_string();
        let says = format!("pool_block must be 16 to 128 and divide the block of 48, got {bad}");
        assert_eq!(error, says);
    }
}

/// Prism's selector is the rule on the oracle's pooled vectors.
#[test]
fn prism_is_the_rule_of_the_crate() {
    use prism_core::oracle;
    use prism_core::selectors::{Selector, SelectorInput};
    let problem = Problem::new(16, &[(150, 230)], (4, 2), 16, 61);
    let (rope, shape) = (Rope::new(1e3), problem.shape);
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let q = oracle::pool_queries(&wide(&problem.q), 4, 150, 16, &problem.grids);
    let k = oracle::pool_keys(&wide(&problem.k), 2, 230, 16, &problem.grids);
    for (high_dims, low_dims) in [(None, None), (Some(8), Some(12))] {
        for calibration in [prism_core::Calibration::Global, prism_core::Calibration::Off] {
            let mass = Some(0.8);
            let selector = Prism { mass, high_dims, low_dims, calibration, ..Prism::default() };
            let rule =
                SelectionRule { budget: prism_core::Budget::Mass(0.8), ..SelectionRule::default() };
            let bands = prism_core::Bands::new(selector.bands(), Some(&rope), 16, 16).unwrap();
            let expected =
                oracle::select(&q, &k, &shape, &problem.grids, &bands, calibration, &rule);
            let input =
                SelectorInput { rope: Some(&rope), ..problem.input(SelectionRule::default()) };
            assert_eq!(selector.select(&input).unwrap(), expected);
        }
    }
    let config = SelectorConfig::Prism(Prism {
        high_dims: Some(18),
        low_dims: Some(2),
        ..Default::default()
    });
    let input = SelectorInput { rope: Some(&rope), ..problem.input(bare()) };
    let error = config.select(&input).unwrap_err().to_string();
    assert!(error.contains("high_dims must be even and at most the rotary dim (16), got 18"));
}
