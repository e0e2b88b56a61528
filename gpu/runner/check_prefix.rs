//! The heaviest of long rows against a sort.

use prism_bench::Gpu;
use prism_bench::inputs::value;
use prism_bench::report::Run;
use prism_core::select::Prefix;
use prism_kernels::Element;
use prism_kernels::select::heaviest_prefix;

use crate::check_attention::push;
use crate::check_outliers::integers;

/// Rows as long as prompts and as maps of their blocks, heavy ones rare and many alike.
pub fn right(gpu: &Gpu, run: &mut Run) {
    let Gpu { client, capabilities } = gpu;
    for len in [5000, 131_072, 1 << 20] {
        let mass = |i: usize| -> i32 {
            let x = value(3, i, Element::F32);
            match i % 7 {
                0 => (x * 4.0).exp() as i32,
                1 => -1,
                2 => 0,
                _ => 300,
            }
        };
        let masses: Vec<i32> = (0..2 * len).map(mass).collect();
        for prefix in [Prefix::Reaching, Prefix::Within, Prefix::Count] {
            let weight = |mass: i32| if prefix == Prefix::Count { 1 } else { i64::from(mass) };
            let limits: Vec<i32> = masses
                .chunks(len)
                .zip([0.9, 0.2])
                .map(|(row, share)| {
                    let row = row.iter().filter(|&&mass| mass >= 0);
                    (row.map(|&mass| weight(mass)).sum::<i64>() as f64 * share) as i32
                })
                .collect();
            let upload = |x: &[i32]| client.create_from_slice(bytemuck::cast_slice(x));
            let (a, b) = (upload(&masses), upload(&limits));
            let got = heaviest_prefix(client, capabilities, &a, &b, [2, len], prefix);
            let got = integers(gpu, &got);
            let mut right = vec![0u32; 2 * len];
            for (row, limit) in limits.iter().enumerate() {
                let row = row * len..(row + 1) * len;
                let mut order: Vec<usize> = row.filter(|&i| masses[i] >= 0).collect();
                order.sort_by_key(|&i| (-masses[i], i));
                let mut sum = 0;
                for i in order {
                    let next = sum + weight(masses[i]);
                    let over = if prefix == Prefix::Within { next } else { sum + 1 };
                    if over > i64::from(*limit) {
                        break;
                    }
                    (sum, right[i]) = (next, 1);
                }
            }
            let wrong = got.iter().zip(&right).filter(|(a, b)| a != b).count();
            let detail = format!("{wrong} wrong of {}", right.iter().sum::<u32>());
            let name = format!("heaviest of {len}, {prefix:?}");
            push(run, name, if wrong == 0 { Ok(detail) } else { Err(detail) });
        }
    }
}
