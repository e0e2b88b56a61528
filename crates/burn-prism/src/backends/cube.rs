//! Every CubeCL runtime: the CPU runtime, CUDA, ROCm, WebGPU, Vulkan and Metal are one backend, and
//! a tensor's device says which of them it is on. Tensor ops throughout.

use burn_cubecl::CubeBackend;

use crate::ops::PrismBackend;

impl PrismBackend for CubeBackend {}
