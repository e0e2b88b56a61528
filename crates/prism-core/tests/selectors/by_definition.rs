//! Each method against its definition, token by token and in f64.

use prism_core::BlockSelection;
use prism_core::selectors::flexprefill::HeadPattern;
use prism_core::selectors::{
    Dilated, FlexPrefill, Head, MInference, MeanPool, Oracle, Outliers, SecondOrder, Selector,
    Streaming, StreamingPattern, TopK, XAttention,
};

use crate::support::{Problem, bare, dot, heaviest, softmax};

const BLOCK: usize = 16;

/// A whole prompt, and a chunk that starts mid-block.
fn problems() -> [Problem; 2] {
    [
        Problem::new(BLOCK, &[(240, 240)], (2, 1), 8, 41),
        Problem::new(BLOCK, &[(101, 235)], (2, 1), 8, 43),
    ]
}

/// The smallest set of the heaviest blocks that holds a mass.
fn by_mass(masses: &[f64], mass: f64) -> Vec<usize> {
    let mut sum = 0.0;
    let mut chosen = Vec::new();
    for v in heaviest(masses) {
        chosen.push(v);
        sum += masses[v];
        if sum >= mass {
            break;
        }
    }
    chosen.sort_unstable();
    chosen
}

/// Compares the rows of all heads with what `expected(head, row)` says.
fn check(
    problem: &Problem,
    selection: &BlockSelection,
    mut expected: impl FnMut(usize, usize) -> Vec<usize>,
) {
    for h in 0..problem.shape.q_heads {
        for row in 0..problem.grids[0].rows() {
            let got: Vec<usize> = selection.blocks(0, h, row).collect();
            assert_eq!(got, expected(h, row), "head {h}, row {row}");
        }
    }
}

fn block_mean(vectors: impl ExactSizeIterator<Item = Vec<f32>>) -> Vec<f32> {
    let count = vectors.len() as f64;
    let mut sum = vec![0.0f64; 8];
    vectors.for_each(|x| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(x)));
    sum.into_iter().map(|sum| (sum / count) as f32).collect()
}

/// Probabilities of the key blocks by block means.
fn pooled(problem: &Problem, h: usize, row: usize) -> Vec<f64> {
    let grid = problem.grids[0];
    let q = block_mean(grid.queries(row).map(|i| problem.query(0, h, i).to_vec()));
    let scores = (0..grid.causal_blocks(row)).map(|v| {
        let k = block_mean(grid.keys(v).map(|j| problem.key(0, h, j).to_vec()));
        dot(&q, &k) / 8f64.sqrt()
    });
    softmax(scores.collect())
}

#[test]
fn mean_pool_and_top_k() {
    for problem in problems() {
        let selection = problem.select(&MeanPool { mass: Some(0.6) });
        check(&problem, &selection, |h, row| by_mass(&pooled(&problem, h, row), 0.6));
        let selection = problem.select(&TopK { blocks: 3 });
        check(&problem, &selection, |h, row| {
            let mut best = heaviest(&pooled(&problem, h, row));
            best.truncate(3);
            best.sort_unstable();
            best
        });
    }
}

#[test]
fn oracle() {
    for problem in problems() {
        let grid = problem.grids[0];
        let selection = problem.select(&Oracle { mass: Some(0.7) });
        check(&problem, &selection, |h, row| {
            let mut masses = vec![0.0; grid.causal_blocks(row)];
            let queries = grid.queries(row);
            for i in queries.clone() {
                for (j, p) in problem.probabilities(0, h, i).into_iter().enumerate() {
                    masses[j / BLOCK] += p / queries.len() as f64;
                }
            }
            by_mass(&masses, 0.7)
        });
    }
}

/// Sums along antidiagonals, position by position.
#[test]
fn xattention() {
    for problem in problems() {
        let grid = problem.grids[0];
        for stride in [4usize, 8, 16] {
            let threshold = 0.6;
            let selection = problem.select(&XAttention { stride, threshold });
            let first = grid.first_position();
            let query = |h: usize, p: usize| {
                (first..grid.kv_len()).contains(&p).then(|| problem.query(0, h, p - first))
            };
            check(&problem, &selection, |h, row| {
                let u = grid.first_block() + row;
                let groups = (u * BLOCK / stride..(u + 1) * BLOCK / stride)
                    .filter(|a| (0..stride).any(|i| query(h, a * stride + i).is_some()));
                let mut masses = vec![0.0; u + 1];
                for a in groups {
                    let scores = (0..=a).map(|c| {
                        let terms = (0..stride).map(|i| {
                            let key = c * stride + i;
                            match query(h, a * stride + stride - 1 - i) {
                                Some(q) if key < grid.kv_len() => dot(q, problem.key(0, h, key)),
                                _ => 0.0,
                            }
                        });
                        terms.sum::<f64>() / (8f64.sqrt() * stride as f64)
                    });
                    for (c, p) in softmax(scores.collect()).into_iter().enumerate() {
                        masses[c * stride / BLOCK] += p;
                    }
                }
                let total: f64 = masses.iter().sum();
                let masses: Vec<f64> = masses.into_iter().map(|mass| mass / total).collect();
                by_mass(&masses, threshold)
            });
        }
    }
}

/// Forced blocks count first, so that fewer others follow than of the heaviest.
#[test]
fn xattention_counts_forced_blocks_first() {
    let problem = &problems()[0];
    let rule = prism_core::SelectionRule { sink_blocks: 1, recent_blocks: 1, ..bare() };
    let selector = XAttention { stride: 16, threshold: 0.6 };
    let selection = selector.select(&problem.input(rule)).unwrap();
    // Groups of a block: the masses are those of one softmax of antidiagonal sums.
    check(problem, &selection, |h, row| {
        let scores = (0..=row).map(|v| {
            let terms = (0..16).map(|i| {
                dot(problem.query(0, h, row * 16 + 15 - i), problem.key(0, h, v * 16 + i))
            });
            terms.sum::<f64>() / (8f64.sqrt() * 16.0)
        });
        let masses = softmax(scores.collect());
        let mut chosen = vec![0, row];
        chosen.dedup();
        let mut sum: f64 = chosen.iter().map(|&v| masses[v]).sum();
        for v in heaviest(&masses) {
            if sum >= 0.6 {
                break;
            }
            if !chosen.contains(&v) {
                chosen.push(v);
                sum += masses[v];
            }
        }
        chosen.sort_unstable();
        chosen
    });
}

/// Which tokens are read, rounded out to blocks.
fn rounded(problem: &Problem, row: usize, reads: impl Fn(usize, usize) -> bool) -> Vec<usize> {
    let grid = problem.grids[0];
    let start = (grid.first_block() + row) * BLOCK;
    let positions = start..(start + BLOCK).min(grid.kv_len());
    let any = |v: &usize| {
        let keys = grid.keys(*v);
        positions.clone().any(|p| keys.clone().any(|j| j <= p && reads(p, j)))
    };
    (0..grid.causal_blocks(row)).filter(any).collect()
}

#[test]
fn minference() {
    // Block-aligned ends: rounding out of a short last block would read more than its tokens do.
    let chunk = Problem::new(BLOCK, &[(112, 240)], (2, 1), 8, 43);
    for problem in [problems()[0].clone(), chunk] {
        let grid = problem.grids[0];
        let selector = MInference {
            vertical: Some(36),
            slash: Some(110),
            last_queries: 20,
            ..Default::default()
        };
        let selection = problem.select(&selector);
        let lines = |h: usize| {
            let len = grid.kv_len();
            let (mut columns, mut diagonals) = (vec![0.0; len], vec![0.0; len]);
            for i in grid.q_len() - 20..grid.q_len() {
                let row = problem.probabilities(0, h, i);
                let position = row.len() - 1;
                for (j, p) in row.into_iter().enumerate() {
                    columns[j] += p;
                    diagonals[position - j] += p;
                }
            }
            columns[..30].fill(f64::INFINITY);
            diagonals[..100].fill(f64::INFINITY);
            let mut columns = heaviest(&columns);
            let mut diagonals = heaviest(&diagonals);
            columns.truncate(36);
            diagonals.truncate(110);
            (columns, diagonals)
        };
        let lines = [lines(0), lines(1)];
        check(&problem, &selection, |h, row| {
            let (columns, diagonals) = &lines[h];
            rounded(&problem, row, |p, j| columns.contains(&j) || diagonals.contains(&(p - j)))
        });
    }
}

/// Heads with a few strong columns and diagonals go by these.
#[test]
fn flexprefill_vertical_slash() {
    let problem = &problems()[0];
    let grid = problem.grids[0];
    let selector = FlexPrefill { gamma: 0.7, tau: 0.0, min_budget: 16, max_budget: Some(80) };
    let selection = problem.select(&selector);
    check(problem, &selection, |h, row| {
        let (mut columns, mut diagonals) = (vec![0.0; 240], vec![0.0; 240]);
        for i in 240 - BLOCK..240 {
            for (j, p) in problem.probabilities(0, h, i).into_iter().enumerate() {
                columns[j] += p / BLOCK as f64;
                diagonals[i - j] += p / BLOCK as f64;
            }
        }
        let choose = |values: &[f64]| {
            let mut sum = 0.0;
            let mut within = 0;
            for i in heaviest(values) {
                sum += values[i];
                if sum > 0.7 {
                    break;
                }
                within += 1;
            }
            let blocks = ((within + 1) / BLOCK + 1).clamp(1, 5);
            let mut pooled: Vec<f64> = values.chunks(BLOCK).map(|x| x.iter().sum()).collect();
            pooled[0] = f64::INFINITY;
            let mut best = heaviest(&pooled);
            best.truncate(blocks);
            best
        };
        let (columns, diagonals) = (choose(&columns), choose(&diagonals));
        let read = |&v: &usize| columns.contains(&v) || diagonals.contains(&(row - v));
        (0..grid.causal_blocks(row)).filter(read).collect()
    });
}

/// The others share one budget over the map of block means.
#[test]
fn flexprefill_query_aware() {
    for problem in problems() {
        let grid = problem.grids[0];
        // Any divergence is below this one.
        let selector = FlexPrefill { gamma: 0.5, tau: 1.0, min_budget: 16, max_budget: None };
        let selection = problem.select(&selector);
        let shared = |h: usize| {
            let mut pairs: Vec<(f64, usize, usize)> = (0..grid.rows())
                .flat_map(|row| {
                    let masses = pooled(&problem, h, row).into_iter().enumerate();
                    masses.map(move |(v, p)| (p, row, v)).collect::<Vec<_>>()
                })
                .collect();
            pairs.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap());
            let mut sum = 0.0;
            pairs.retain(|pair| {
                sum += pair.0;
                sum <= 0.5 * grid.rows() as f64
            });
            pairs
        };
        let shared = [shared(0), shared(1)];
        check(&problem, &selection, |h, row| {
            let causal = grid.causal_blocks(row);
            let paired = |v: usize| shared[h].iter().any(|pair| (pair.1, pair.2) == (row, v));
            (0..causal).filter(|&v| v == 0 || v + 1 == causal || paired(v)).collect()
        });
    }
}

fn pattern(problem: &Problem, selector: &FlexPrefill) -> HeadPattern {
    let grid = problem.grids[0];
    selector.pattern(&Head {
        q: &problem.q,
        k: &problem.k,
        head_dim: problem.shape.head_dim,
        index: 0,
        grid,
        scale: 1.0 / (problem.shape.head_dim as f64).sqrt(),
        rope: None,
    })
}

/// Means tell all where keys of a block are alike, and nothing of a single loud key.
#[test]
fn flexprefill_tells_heads_apart() {
    let mut problem = Problem::new(BLOCK, &[(480, 480)], (1, 1), 8, 47);
    let selector = FlexPrefill { min_budget: 64, ..Default::default() };
    problem.q.fill(1.0);
    for (j, key) in problem.k.chunks_exact_mut(8).enumerate() {
        key.fill(((j / BLOCK) % 3) as f32);
    }
    assert_eq!(pattern(&problem, &selector), HeadPattern::QueryAware);
    assert_eq!(
        pattern(&problem, &FlexPrefill { tau: 0.0, ..selector.clone() }),
        HeadPattern::VerticalSlash
    );
    problem.k.fill(0.0);
    problem.k[8 * 100..8 * 101].fill(20.0);
    assert_eq!(pattern(&problem, &selector), HeadPattern::VerticalSlash);
    let short = FlexPrefill { min_budget: 480, ..Default::default() };
    assert_eq!(pattern(&problem, &short), HeadPattern::Dense);
    let selection = problem.select(&short);
    assert_eq!(selection, BlockSelection::dense(&problem.grids, 1));
}

#[test]
fn streaming() {
    for problem in problems() {
        let grid = problem.grids[0];
        for (sink, window, last) in [(20, 40, 0), (0, 1, 0), (16, 17, 10), (0, 33, 17)] {
            let selector = Streaming {
                pattern: StreamingPattern::AShape,
                sink: Some(sink),
                window: Some(window),
                last: Some(last),
            };
            check(&problem, &problem.select(&selector), |_, row| {
                let last = grid.kv_len() - last;
                let dense = grid.queries(row).end + grid.kv_len() - grid.q_len() > last;
                rounded(&problem, row, |p, j| dense || p - j < window || j < sink)
            });
        }
    }
}

/// LongNet's sparse rows and columns, on positions that stand for blocks.
#[test]
fn dilated() {
    let problem = Problem::new(1, &[(40, 40)], (3, 3), 8, 53);
    let (segments, strides) = ([8, 16], [2, 3]);
    let selector = Dilated { segments: segments.to_vec(), strides: strides.to_vec() };
    check(&problem, &problem.select(&selector), |h, i| {
        let mut reads = vec![false; i + 1];
        for (w, r) in segments.into_iter().zip(strides) {
            let kept: Vec<usize> = (0..40)
                .step_by(w)
                .filter(|start| (*start..start + w).contains(&i))
                .flat_map(|start| (start + h % r..start + w).step_by(r))
                .collect();
            if kept.contains(&i) {
                kept.iter().filter(|&&j| j <= i).for_each(|&j| reads[j] = true);
            }
        }
        // A row that no pattern keeps reads itself.
        reads[i] |= reads.iter().all(|&read| !read);
        (0..=i).filter(|&j| reads[j]).collect()
    });
}

/// Sub-blocks, each with its shortest key apart, and the largest mass of a row's sub-blocks.
#[test]
fn outliers() {
    const BLOCK: usize = 64;
    let (query_sub, key_sub, threshold) = (32, 16, 0.1);
    let selector = Outliers { threshold, query_sub: Some(query_sub), key_sub: Some(key_sub) };
    let mut spans = [0, 0];
    let problems = [
        Problem::new(BLOCK, &[(400, 400)], (2, 1), 8, 41),
        Problem::new(BLOCK, &[(171, 395)], (2, 1), 8, 43),
    ];
    for mut problem in problems {
        // Some sub-blocks scatter beyond what their number of keys bears, one key is an outlier.
        problem.k.chunks_mut(8).skip(48).take(160).for_each(|k| k[3] *= 12.0);
        problem.k[8 * 70..8 * 71].fill(0.01);
        problem.q.chunks_mut(8).skip(60).take(90).for_each(|q| q[3] += 4.0);
        let grid = problem.grids[0];
        let (first, len) = (grid.first_position(), grid.kv_len());
        let selection = problem.select(&selector);
        check(&problem, &selection, |h, row| {
            let block = (grid.first_block() + row) * BLOCK;
            let mut largest = vec![0.0f64; grid.causal_blocks(row)];
            for start in (block..block + BLOCK).step_by(query_sub) {
                let seen: Vec<usize> =
                    (start..start + query_sub).filter(|p| (first..len).contains(p)).collect();
                let Some(&last) = seen.last() else { continue };
                let q = seen.iter().map(|p| problem.query(0, h, p - first).to_vec());
                let q = block_mean(q.collect::<Vec<_>>().into_iter());
                let (mut scores, mut owners) = (Vec::new(), Vec::new());
                for t in (0..=last).step_by(key_sub) {
                    let keys: Vec<Vec<f32>> = (t..(t + key_sub).min(len))
                        .map(|j| problem.key(0, h, j).to_vec())
                        .collect();
                    let each: Vec<f64> = keys.iter().map(|k| dot(&q, k) / 8f64.sqrt()).collect();
                    let mean = block_mean(keys.clone().into_iter());
                    // Dims scatter by themselves.
                    let variance: f64 = (0..8)
                        .map(|c| {
                            let of = |k: &Vec<f32>| f64::from(k[c] - mean[c]).powi(2);
                            let v = keys.iter().map(of).sum::<f64>() / keys.len() as f64;
                            f64::from(q[c]).powi(2) / 8.0 * v
                        })
                        .sum();
                    let n = each.len() as f64;
                    let bears = variance < 2.0 * n.ln();
                    spans[usize::from(bears)] += 1;
                    let rise = match bears {
                        true => variance / 2.0,
                        false => (2.0 * n.ln() * variance).sqrt() - n.ln(),
                    };
                    scores.push(each.iter().sum::<f64>() / n + rise + n.ln());
                    owners.push(t / BLOCK);
                    let square = |j: usize| dot(&keys[j], &keys[j]);
                    let short = (1..keys.len())
                        .fold(0, |best, j| if square(j) < square(best) { j } else { best });
                    if t + short <= last {
                        scores.push(each[short]);
                        owners.push(t / BLOCK);
                    }
                }
                let mut masses = vec![0.0; largest.len()];
                softmax(scores).iter().zip(owners).for_each(|(p, v)| masses[v] += p);
                largest.iter_mut().zip(masses).for_each(|(most, mass)| *most = most.max(mass));
            }
            let own = largest.len() - 1;
            let mut read: Vec<usize> = (0..=own).filter(|&v| largest[v] >= threshold).collect();
            if read.is_empty() {
                read.push(own);
            }
            read
        });
    }
    assert!(spans.iter().all(|&count| count > 40), "{spans:?}");
}

#[test]
fn second_order() {
    for problem in problems() {
        let grid = problem.grids[0];
        let selection = problem.select(&SecondOrder { mass: Some(0.6), ..Default::default() });
        check(&problem, &selection, |h, row| {
            let q = block_mean(grid.queries(row).map(|i| problem.query(0, h, i).to_vec()));
            let scores = (0..grid.causal_blocks(row)).map(|v| {
                let keys = || grid.keys(v).map(|j| problem.key(0, h, j).to_vec());
                let mean = block_mean(keys());
                let spread = block_mean(keys().map(|key| {
                    key.iter().zip(&mean).map(|(x, mean)| (x - mean).powi(2)).collect()
                }));
                let squares: Vec<f32> = q.iter().map(|x| x * x).collect();
                dot(&q, &mean) / 8f64.sqrt() + 0.5 * dot(&squares, &spread) / 8.0
            });
            by_mass(&softmax(scores.collect()), 0.6)
        });
    }
}
