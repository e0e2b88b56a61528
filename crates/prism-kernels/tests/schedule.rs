//! Is every row worked once, kv head by kv head, the longest first, and a group's heads side by side?

mod support;

use prism_kernels::schedule::schedule;
use prism_kernels::select::Selection;
use support::*;

/// The order of the rows of `[batch, q_heads, kv_heads]` heads, each of which reads `count` of `blocks`.
fn ordered(
    Bench { client, capabilities, .. }: &Bench,
    heads: [usize; 3],
    [rows, blocks]: [usize; 2],
    count: impl Fn(usize) -> usize,
) -> Vec<usize> {
    let counts: Vec<u32> = (0..heads[0] * heads[1] * rows).map(|i| count(i) as u32).collect();
    let selection = Selection {
        // Which blocks they are makes no difference.
        words: client.empty(4),
        counts: client.create_from_slice(bytemuck::cast_slice(&counts)),
        rows,
        words_per_row: blocks.div_ceil(32),
    };
    let order = schedule(client, capabilities, &selection, heads, blocks);
    integers(client, &order).into_iter().map(|line| line as usize).collect()
}

#[test]
fn is_every_row_worked_once_and_the_longest_first() {
    let (heads, rows, blocks) = ([2, 6, 2], 37, 300);
    let per_kv_head = 3 * rows;
    let count = |line: usize| line * 7919 % (blocks + 1);
    for device in devices() {
        let order = ordered(&device, heads, [rows, blocks], count);
        for (kv_head, lines) in order.chunks_exact(per_kv_head).enumerate() {
            let mut sorted = lines.to_vec();
            sorted.sort_unstable();
            let all: Vec<_> = (kv_head * per_kv_head..(kv_head + 1) * per_kv_head).collect();
            assert_eq!(sorted, all, "{}", device.name);
            // 256 lengths are told apart: a bin holds two of 300 blocks at most.
            let longest_first = lines.is_sorted_by(|&a, &b| count(a) + 2 > count(b));
            assert!(longest_first, "{}: {lines:?}", device.name);
        }
    }
}

/// What they select in common is read from memory once only if they are worked at about the same time.
#[test]
fn do_heads_of_a_group_lie_side_by_side() {
    let (group, rows) = (4, 1000);
    for device in devices() {
        let order = ordered(&device, [1, 2 * group, 2], [rows, 100], |_| 9);
        for lines in order.chunks_exact(group * rows) {
            let mut places = vec![(usize::MAX, 0); rows];
            for (place, line) in lines.iter().enumerate() {
                let (first, last) = &mut places[line % rows];
                (*first, *last) = ((*first).min(place), (*last).max(place));
            }
            let apart = places.iter().map(|(first, last)| last - first).max();
            // Units take their places in any order, of 256 lines at a time.
            assert!(apart < Some(512), "{}: {apart:?}", device.name);
        }
    }
}
