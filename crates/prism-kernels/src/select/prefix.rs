//! The heaviest elements of long rows, up to a sum: a cube a row.
//!
//! Elements are ordered by (mass descending, index ascending). As in [`search`](super::search) nothing is
//! sorted: the lightest mass of the prefix is found two bits at a time.

use cubecl::ir::AddressType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use prism_core::select::Prefix;

use crate::capabilities::Capabilities;
use crate::operand::buffer;
use crate::work::{cube_count, launch};

/// Most units a cube.
const UNITS: u32 = 1024;
/// Masses that a unit reads at once.
const AHEAD: usize = 4;

/// Whether the kernel runs on a device: one with planes, since a row is too long for one unit.
pub fn finds_prefixes(capabilities: &Capabilities) -> bool {
    capabilities.plane.is_some()
}

/// 1 for every element of the prefix, 0 for the others, `[rows, len]` i32, on a device that [finds
/// prefixes](finds_prefixes). `masses` are `[rows, len]` i32,
/// together below 2³¹ a row where they are added up; negative ones take no part. `limits` are `[rows]` i32.
pub fn heaviest_prefix(
    client: &Client,
    capabilities: &Capabilities,
    masses: &Handle,
    limits: &Handle,
    [rows, len]: [usize; 2],
    prefix: Prefix,
) -> Handle {
    let elements = rows * len;
    let out = client.empty((elements * 4).max(4));
    let Some(lanes) = capabilities.plane.filter(|_| elements > 0) else { return out };
    let planes = (UNITS.min(capabilities.units) / lanes).clamp(1, lanes);
    let shape = PrefixShape { lanes: lanes as usize, planes: planes as usize, prefix };
    // SAFETY: cubes past the last row return, and units stay within their row.
    unsafe {
        launch!(
            prefix_kernel,
            client,
            cube_count(client, rows),
            CubeDim::new_2d(lanes, planes),
            AddressType::from_len(elements),
            buffer(masses, elements),
            buffer(limits, rows),
            buffer(&out, elements),
            rows,
            len,
            shape,
        );
    }
    out
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PrefixShape {
    lanes: usize,
    /// Planes a cube, at most as many as a plane has lanes.
    planes: usize,
    prefix: Prefix,
}

impl PrefixShape {
    fn units(&self) -> usize {
        self.lanes * self.planes
    }
}

#[cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic")]
fn prefix_kernel(
    masses: &[i32],
    limits: &[i32],
    out: &mut [i32],
    rows: usize,
    len: usize,
    #[comptime] shape: PrefixShape,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut shared = Shared::<[u32]>::new_slice(comptime!(3 * shape.planes));
    let start = row * len;
    let limit = limits[row];
    let room = u32::cast_from(limit.max(0i32));
    // What the elements not lighter than the lightest reach: the room, or the first sum beyond it.
    let target = room + comptime!(if shape.prefix == Prefix::Within { 1u32 } else { 0 });
    let mut lightest = 0u32;
    #[unroll]
    for pass in 0..16usize {
        let shift = comptime!(30 - 2 * pass as u32);
        let above = sums(masses, &mut shared, start, len, lightest, shift, shape);
        let mut steps = 0u32;
        #[unroll]
        for j in 0..3usize {
            if above[j] >= target {
                steps = comptime!(j as u32 + 1).runtime();
            }
        }
        lightest += steps << shift;
    }

    let mut heavier = 0u32;
    let mut tied = 0u32;
    let mut i = UNIT_POS as usize;
    while i < len {
        let mass = masses[start + i];
        let there = mass >= 0i32;
        let mass = u32::reinterpret(mass);
        heavier += select(there && mass > lightest, weight(mass, shape), 0u32);
        tied += select(there && mass == lightest, 1u32, 0u32);
        i += comptime!(shape.units());
    }
    let heavier = total(heavier, &mut shared, 0usize, shape);
    let tied = total(tied, &mut shared, 0usize, shape);

    // How many of the elements of the lightest mass.
    let each = weight(lightest, shape);
    let missing = room - heavier.min(room);
    let mut wanted = tied;
    if each > 0u32 {
        if comptime!(shape.prefix == Prefix::Within) {
            wanted = missing / each;
        } else {
            wanted = missing.div_ceil(each);
        }
    } else if comptime!(shape.prefix != Prefix::Within) {
        wanted = select(missing == 0u32, 0u32, tied);
    }
    if limit < 0i32 {
        wanted = 0u32;
    }
    // They are those before `end`.
    let mut end = select(wanted == 0u32, 0usize, len);
    if wanted > 0u32 && wanted < tied {
        let mut low = 0usize;
        let mut high = len - 1;
        while low < high {
            let middle = (low + high) / 2;
            let mut count = 0u32;
            let mut i = UNIT_POS as usize;
            while i <= middle {
                count += select(masses[start + i] == i32::reinterpret(lightest), 1u32, 0u32);
                i += comptime!(shape.units());
            }
            if total(count, &mut shared, 0usize, shape) >= wanted {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        end = low + 1;
    }
    let mut i = UNIT_POS as usize;
    while i < len {
        let mass = masses[start + i];
        let there = mass >= 0i32;
        let mass = u32::reinterpret(mass);
        let kept = there && (mass > lightest || (mass == lightest && i < end));
        out[start + i] = select(kept, 1i32, 0i32);
        i += comptime!(shape.units());
    }
}

/// What an element adds to the sum.
#[cube]
fn weight(mass: u32, #[comptime] shape: PrefixShape) -> u32 {
    if comptime!(shape.prefix == Prefix::Count) { 1u32.runtime() } else { mass }
}

/// What the elements add that weigh at least `lightest` + 1, 2, 3 times 2^`shift`.
#[cube]
fn sums(
    masses: &[i32],
    shared: &mut Shared<[u32]>,
    start: usize,
    len: usize,
    lightest: u32,
    #[comptime] shift: u32,
    #[comptime] shape: PrefixShape,
) -> Array<u32> {
    let (units, ahead) = comptime!((shape.units(), AHEAD));
    let mut sums = Array::<u32>::new(3usize);
    #[unroll]
    for j in 0..3usize {
        sums[j] = 0u32;
    }
    let mut i = UNIT_POS as usize;
    while i < len {
        let mut read = Array::<i32>::new(ahead);
        #[unroll]
        for n in 0..ahead {
            read[n] = masses[start + (i + n * units).min(len - 1)];
        }
        #[unroll]
        for n in 0..ahead {
            let there = read[n] >= 0i32 && i + n * units < len;
            let mass = u32::reinterpret(read[n]);
            #[unroll]
            for j in 0..3usize {
                // Beyond 2³¹ no mass is.
                let bound = comptime!((j as u64 + 1) << shift);
                if comptime!(bound < 1 << 31) {
                    let heavy = there && mass >= lightest + comptime!(bound as u32);
                    sums[j] += select(heavy, weight(mass, shape), 0u32);
                }
            }
        }
        i += ahead * units;
    }
    #[unroll]
    for j in 0..3usize {
        sums[j] = total(sums[j], shared, comptime!(j * shape.planes).runtime(), shape);
    }
    sums
}

/// Sum over the units of the cube, by way of the shared numbers from `at` on.
#[cube]
fn total(x: u32, shared: &mut Shared<[u32]>, at: usize, #[comptime] shape: PrefixShape) -> u32 {
    let planes = comptime!(shape.planes);
    let sum = plane_sum(x);
    if comptime!(planes == 1) {
        sum
    } else {
        if UNIT_POS_X == 0 {
            shared[at + UNIT_POS_Y as usize] = sum;
        }
        sync_cube();
        let lane = UNIT_POS_X as usize;
        let of_plane = shared[at + lane.min(planes - 1)];
        let all = plane_sum(select(lane < planes, of_plane, 0u32));
        // Nobody writes anew before all have read.
        sync_cube();
        all
    }
}
