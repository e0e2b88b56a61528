//! What a device can do, read once on the host: kernels are chosen from this, never by trial.

use cubecl::features::{MmaConfig, Plane, Tma};
use cubecl::prelude::*;
use serde::Serialize;

use crate::operand::Element;

/// What the choice of kernels depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Units of a plane (subgroup, warp), if it has a fixed size above 1 and can add and compare
    /// across its units.
    pub plane: Option<u32>,
    /// Whether tensor cores multiply f16 by `mma` m16n8k16 and fragments load by `ldmatrix`.
    pub mma_f16: bool,
    /// Likewise for bf16.
    pub mma_bf16: bool,
    /// Whether global memory can be copied to shared memory asynchronously. On CUDA also what
    /// tells CubeCL's C++ compiler, which takes inline PTX, from its LLVM one, which doesn't.
    pub copy_async: bool,
    /// Whether the device is a Hopper (sm_90) whose kernels may use `wgmma` and TMA.
    pub hopper: bool,
    /// Bytes of shared memory a cube.
    pub shared_memory: usize,
    /// Units a cube.
    pub units: u32,
    /// Multiprocessors, where the device tells.
    pub multiprocessors: Option<u32>,
    /// Cores, if the device is a CPU.
    pub cores: Option<u32>,
}

impl Capabilities {
    /// Reads a device.
    pub fn of(client: &Client) -> Self {
        let properties = client.properties();
        let (features, hardware) = (&properties.features, &properties.hardware);
        let fixed = hardware.plane_size_min == hardware.plane_size_max;
        let planes = fixed && hardware.plane_size_min > 1 && features.plane.contains(Plane::Ops);
        let warps = planes && hardware.plane_size_min == 32;
        let mma = |element: Element| {
            let ab = element.elem_type();
            let config = MmaConfig {
                a_type: ab,
                b_type: ab,
                cd_type: Element::F32.elem_type(),
                m: 16,
                n: 8,
                k: 16,
            };
            warps && features.matmul.mma.contains(&config) && features.matmul.ldmatrix.contains(&ab)
        };
        Self {
            plane: planes.then_some(hardware.plane_size_min),
            mma_f16: mma(Element::F16),
            mma_bf16: mma(Element::BF16),
            copy_async: features.copy_async,
            // TMA came with Hopper and stayed, wgmma left with it: only the target of compilation, which
            // is what the fingerprint says, tells them apart. CubeCL's LLVM compiler has no TMA.
            hopper: features.tma.contains(Tma::Base)
                && features.copy_async
                && properties.identity.fingerprint == "ptx_sm90",
            shared_memory: hardware.max_shared_memory_size,
            units: hardware.max_units_per_cube,
            multiprocessors: hardware.num_streaming_multiprocessors,
            cores: (hardware.plane_size_max == 1).then(|| hardware.num_cpu_cores.unwrap_or(1)),
        }
    }

    /// Units that work a line together, and lines a cube of at most `planes` planes: a plane a line, or a unit
    /// where there are none.
    pub(crate) fn lines(&self, planes: u32) -> (u32, u32) {
        match (self.plane, self.cores) {
            (Some(lanes), _) => (lanes, planes.min(self.units / lanes).max(1)),
            (None, cores) => (1, cores.unwrap_or(64.min(self.units))),
        }
    }

    /// Whether tensor cores take this element type.
    pub fn mma(&self, element: Element) -> bool {
        match element {
            Element::F32 => false,
            Element::F16 => self.mma_f16,
            Element::BF16 => self.mma_bf16,
        }
    }
}
