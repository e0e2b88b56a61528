//! Are the heaviest elements found, as a sort finds them?

mod support;

use prism_core::select::Prefix;
use prism_kernels::select::{finds_prefixes, heaviest_prefix};
use support::*;

/// By sorting.
fn expected(masses: &[i32], limit: i32, prefix: Prefix) -> Vec<i32> {
    let mut order: Vec<usize> = (0..masses.len()).filter(|&i| masses[i] >= 0).collect();
    order.sort_by_key(|&i| (-i64::from(masses[i]), i));
    let (mut kept, mut sum) = (vec![0; masses.len()], 0i64);
    for i in order {
        let mass = if prefix == Prefix::Count { 1 } else { i64::from(masses[i]) };
        let takes = match prefix {
            Prefix::Within => sum + mass <= i64::from(limit),
            _ => sum < i64::from(limit),
        };
        if !takes {
            break;
        }
        sum += mass;
        kept[i] = 1;
    }
    kept
}

#[test]
fn are_the_heaviest_elements_found() {
    for len in [1, 31, 1000, 4097, 20_000] {
        // Few heavy ones, many alike, many of no mass, some that take no part.
        let masses: Vec<i32> = random(5, 6 * len)
            .into_iter()
            .enumerate()
            .map(|(i, x)| match i / len {
                0 => (x.abs() * 40_000.0) as i32,
                1 => (x * 3.0).exp() as i32 * 50,
                2 => 7,
                3 => 0,
                4 if x > 2.0 => 1 << 21,
                _ => -1,
            })
            .collect();
        let sum = |row: usize| -> i64 {
            masses[row * len..][..len].iter().map(|&mass| i64::from(mass.max(0))).sum()
        };
        (0..6).for_each(|row| assert!(sum(row) < 1 << 31, "row {row} of {len}: {}", sum(row)));
        for Bench { name, client, capabilities } in devices() {
            if !finds_prefixes(&capabilities) {
                continue;
            }
            for prefix in [Prefix::Reaching, Prefix::Within, Prefix::Count] {
                for part in [-1, 0, 1, 3, 500, 950, 1000, 2000] {
                    let limit = |row: usize| -> i32 {
                        let all = if prefix == Prefix::Count { len as i64 } else { sum(row) };
                        if part < 4 { part } else { (all * i64::from(part) / 1000) as i32 }
                    };
                    let limits: Vec<i32> = (0..6).map(limit).collect();
                    let upload = |x: &[i32]| client.create_from_slice(bytemuck::cast_slice(x));
                    let (a, b) = (upload(&masses), upload(&limits));
                    let got = heaviest_prefix(&client, &capabilities, &a, &b, [6, len], prefix);
                    let got = integers(&client, &got);
                    for row in 0..6 {
                        let masses = &masses[row * len..][..len];
                        let right = expected(masses, limits[row], prefix);
                        let got: Vec<i32> =
                            got[row * len..][..len].iter().map(|&x| x as i32).collect();
                        assert!(
                            got == right,
                            "{name}, {prefix:?}, row {row} of {len}, limit {}",
                            limits[row]
                        );
                    }
                }
            }
        }
    }
}
