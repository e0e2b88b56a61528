//! The device that is timed.

use anyhow::{Context, Result, bail, ensure};
use cubecl::Device;
use cubecl::client::Client;
use cubecl::device::{WgpuBackend, WgpuDevice};
use cubecl::features::TypeUsage;
use prism_kernels::{Capabilities, Element};

/// Kinds of device that CubeCL's kernels run on.
pub const KINDS: [&str; 6] = ["cpu", "cuda", "rocm", "wgpu", "vulkan", "metal"];

/// A device of any CubeCL runtime, and what is known of it.
pub struct Gpu {
    /// Where kernels are launched.
    pub client: Client,
    /// What the kernels are chosen by.
    pub capabilities: Capabilities,
}

impl Gpu {
    /// The device of a client.
    pub fn new(client: Client) -> Self {
        let capabilities = Capabilities::of(&client);
        Self { client, capabilities }
    }

    /// The device of one of [`KINDS`]: by index, or the one that the runtime prefers.
    ///
    /// # Errors
    /// No such kind, a runtime that this build lacks, or no such device.
    pub fn open(kind: &str, index: Option<usize>) -> Result<Self> {
        let first = index.unwrap_or(0);
        let device = match kind {
            "cpu" => {
                ensure!(first == 0, "there is no cpu:{first}, this machine has 1");
                Device::cpu()?
            }
            "cuda" => Device::cuda(first)?,
            "rocm" => Device::rocm(first)?,
            "wgpu" => adapter(WgpuBackend::Auto, index)?,
            "vulkan" => adapter(WgpuBackend::Vulkan, index)?,
            "metal" => adapter(WgpuBackend::Metal, index)?,
            _ => bail!("CubeCL's kernels run on {}, not on {kind:?}", KINDS.join(", ")),
        };
        Ok(Self::new(device.client()))
    }

    /// Whether the device computes with an element type.
    ///
    /// # Errors
    /// It doesn't.
    pub fn check(&self, element: Element) -> Result<()> {
        let has = |element: Element| {
            let usage = self.client.properties().type_usage(element.elem_type());
            usage.is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
        };
        let all = [Element::F32, Element::F16, Element::BF16];
        let names: Vec<_> = all.into_iter().filter(|&one| has(one)).map(name).collect();
        ensure!(has(element), "the device has no {}, it has {}", name(element), names.join(", "));
        Ok(())
    }

    /// Waits for everything launched.
    pub(crate) fn sync(&self) -> Result<()> {
        Ok(cubecl::future::block_on(self.client.sync())?)
    }
}

/// An element type as records name it.
pub fn name(element: Element) -> &'static str {
    match element {
        Element::F32 => "f32",
        Element::F16 => "f16",
        Element::BF16 => "bf16",
    }
}

/// The element type of a name.
///
/// # Errors
/// Another name.
pub fn element(name: &str) -> Result<Element> {
    match name {
        "f32" => Ok(Element::F32),
        "f16" => Ok(Element::F16),
        "bf16" => Ok(Element::BF16),
        other => bail!("element type must be f32, f16 or bf16, got {other:?}"),
    }
}

/// A graphics adapter, counted as CubeCL lists them.
fn adapter(backend: WgpuBackend, index: Option<usize>) -> Result<Device> {
    let Some(index) = index else {
        return Ok(Device::Wgpu(WgpuDevice::default().on(backend)));
    };
    let all = Device::enumerate_all().into_iter();
    let adapter = all.filter(|device| matches!(device, Device::Wgpu(_))).nth(index);
    Ok(adapter.with_context(|| format!("there is no graphics adapter {index}"))?.on(backend)?)
}
