//! The CUDA C++ of the kernels, without a GPU: run host code inside [`sources`] with the
//! [`hopper`] capabilities, and every launch is written down instead of made.

use std::cell::RefCell;
use std::sync::Arc;

use cubecl::features::{Features, MmaConfig, Plane, Tma};
use cubecl::ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, TargetProperties, types::MatrixLayout,
};
use cubecl::prelude::ExecutionMode;
use cubecl::{Compiler, CubeKernel};
use cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler};
use cubecl_cpp::target::Cuda;

use crate::capabilities::Capabilities;
use crate::operand::Element;

/// The device that kernels are written for while recording.
#[derive(Clone)]
pub struct Target {
    pub(crate) device: Arc<DeviceProperties>,
    pub(crate) target: Arc<TargetProperties>,
}

/// The name of a kernel and its CUDA C++.
pub type Source = (String, String);

thread_local! {
    static RECORDING: RefCell<Option<(Target, Vec<Source>)>> = const { RefCell::new(None) };
}

/// Runs `host` and returns the kernels that it would have launched: name and CUDA C++ source.
pub fn sources(host: impl FnOnce()) -> Vec<Source> {
    RECORDING.with_borrow_mut(|recording| *recording = Some((target(), Vec::new())));
    host();
    RECORDING.take().map(|(_, sources)| sources).unwrap_or_default()
}

/// What an H100 or H200 can do through CubeCL's C++ compiler.
pub fn hopper() -> Capabilities {
    Capabilities {
        plane: Some(32),
        mma_f16: true,
        mma_bf16: true,
        copy_async: true,
        hopper: true,
        shared_memory: 232_448,
        units: 1024,
        multiprocessors: Some(132),
        cores: None,
    }
}

pub(crate) fn recording() -> Option<Target> {
    RECORDING.with_borrow(|recording| recording.as_ref().map(|(target, _)| target.clone()))
}

pub(crate) fn record(name: &str, kernel: impl CubeKernel) {
    let mut definition = kernel.define();
    definition.settings.execution_mode = ExecutionMode::Unchecked;
    let options = CompilationOptions::default();
    let compiled = CppCompiler::<Cuda>::default().compile(definition, &options);
    let source = match compiled {
        Ok(kernel) => kernel.source.clone(),
        Err(error) => format!("#error \"{error}\"\n"),
    };
    RECORDING.with_borrow_mut(|recording| {
        if let Some((_, sources)) = recording {
            sources.push((name.into(), source));
        }
    });
}

fn target() -> Target {
    let mut features = Features::default();
    features.plane.insert(Plane::Ops);
    features.copy_async = true;
    features.tma.insert(Tma::Base);
    for element in [Element::F16, Element::BF16] {
        let ab = element.elem_type();
        let cd_type = Element::F32.elem_type();
        features.matmul.mma.insert(MmaConfig {
            a_type: ab,
            b_type: ab,
            cd_type,
            m: 16,
            n: 8,
            k: 16,
        });
        features.matmul.ldmatrix.insert(ab);
    }
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 32,
        max_shared_memory_size: hopper().shared_memory,
        max_cube_count: (i32::MAX as u32, u16::MAX.into(), u16::MAX.into()),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: hopper().multiprocessors,
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: usize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity =
        DeviceIdentity { name: "offline".into(), fingerprint: "ptx_sm90".into(), physical: None };
    let memory = MemoryDeviceProperties::new(u64::MAX, 256);
    let timing = cubecl::profile::TimingMethod::Device;
    let device = DeviceProperties::new(features, memory, hardware, timing, identity);
    Target { device: Arc::new(device), target: Arc::new(cuda_target()) }
}

/// The register layout of CUDA's matrix instructions.
fn cuda_target() -> TargetProperties {
    TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    }
}
