//! Which problems the rung `hopper` takes, what it says of the others, and that its source holds what
//! the rung is for: all without a GPU.
#![cfg(all(feature = "offline", feature = "cpu"))]

use prism_core::BlockGrid;
use prism_kernels::attend::{AttendProblem, AttendRung, RungError, attend_on};
use prism_kernels::offline::{hopper, sources};
use prism_kernels::{Element, Operand};

const LEN: usize = 300;

fn client() -> cubecl::client::Client {
    cubecl::Device::Cpu(Default::default()).client()
}

fn operand(dim: usize, element: Element) -> Operand {
    Operand::contiguous(client().empty(64), [1, 2, LEN, dim], element)
}

fn checked(q: &Operand, k: &Operand, block: usize) -> Result<(), RungError> {
    let grids = [BlockGrid::new(block, LEN, LEN).expect("a grid")];
    let problem = AttendProblem::new(q, k, k, &grids, None, None, 0.1, true);
    AttendRung::Hopper.check(&hopper(), &problem)
}

#[test]
fn takes_half_precision_and_whole_tiles() {
    for dim in [64, 80, 96, 128] {
        for element in [Element::F16, Element::BF16] {
            let x = operand(dim, element);
            for block in [128, 256] {
                assert_eq!(checked(&x, &x, block), Ok(()));
            }
            assert_eq!(checked(&x, &x, 64), Err(RungError::Block(64)));
            let (rung, refused) = AttendRung::plan(&hopper(), element, dim, 128);
            assert_eq!((rung, refused), (AttendRung::Hopper, vec![]));
        }
    }
}

#[test]
fn says_what_it_does_not_take() {
    let (narrow, wide) = (operand(64, Element::F32), operand(256, Element::BF16));
    assert_eq!(checked(&narrow, &narrow, 128), Err(RungError::NoTensorCores(Element::F32)));
    assert_eq!(checked(&wide, &wide, 128), Err(RungError::TileDim(256)));
    let (rung, refused) = AttendRung::plan(&hopper(), Element::BF16, 128, 64);
    assert_eq!(rung, AttendRung::Mma);
    assert_eq!(refused, [(AttendRung::Hopper, RungError::Block(64))]);
    let (rung, refused) = AttendRung::plan(&hopper(), Element::BF16, 256, 128);
    assert_eq!(rung, AttendRung::Mma);
    assert_eq!(refused, [(AttendRung::Hopper, RungError::TileDim(256))]);
    let mut older = hopper();
    older.hopper = false;
    let (rung, refused) = AttendRung::plan(&older, Element::BF16, 128, 128);
    assert_eq!(rung, AttendRung::Mma);
    assert_eq!(refused, [(AttendRung::Hopper, RungError::NoHopper)]);
}

/// TMA steps and starts in multiples of 16 bytes.
#[test]
fn takes_views_that_tma_can_read() {
    let q = operand(128, Element::BF16);
    let view = |strides, offset| {
        let mut k = operand(128, Element::BF16);
        k.strides = strides;
        k.handle = k.handle.offset_start(offset);
        checked(&q, &k, 128)
    };
    let refused = Err(RungError::Layout("k"));
    // A cache with room, one with heads inside, a slice.
    assert_eq!(view([2 * 1024 * 128, 1024 * 128, 128, 1], 0), Ok(()));
    assert_eq!(view([LEN * 256, 128, 256, 1], 0), Ok(()));
    assert_eq!(view([LEN * 256, LEN * 128, 128, 1], 16), Ok(()));
    assert_eq!(view([LEN * 256, LEN * 128, 128, 1], 8), refused);
    // Rows that start anywhere, heads that are repeated, gaps between elements.
    assert_eq!(view([LEN * 264, LEN * 132, 132, 1], 0), refused);
    assert_eq!(view([LEN * 256, 0, 128, 1], 0), refused);
    assert_eq!(view([LEN * 512, LEN * 256, 256, 2], 0), refused);
    // Of one sequence, the step to the next doesn't matter.
    assert_eq!(view([1, LEN * 128, 128, 1], 0), Ok(()));
}

#[test]
fn is_written_with_wgmma_and_tma() {
    let (client, x) = (client(), operand(80, Element::F16));
    let grids = [BlockGrid::new(128, LEN, LEN).expect("a grid")];
    let problem = AttendProblem::new(&x, &x, &x, &grids, None, None, 0.1, true);
    let kernels = sources(|| {
        attend_on(&client, &hopper(), &problem, AttendRung::Hopper);
    });
    let source = &kernels.last().expect("a kernel").1;
    for needed in [
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16",
        "cp.async.bulk.tensor.4d",
        "setmaxnreg.inc.sync.aligned.u32 232",
        "launch_bounds(n, 1)",
    ] {
        assert!(source.contains(needed), "{needed}");
    }
}
