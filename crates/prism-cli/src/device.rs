//! Devices by name: which kinds this build has, what this machine has of them, and why not the rest.

use anyhow::{Context, Result, anyhow, bail};
use burn::tensor::Device;
#[cfg(feature = "wgpu")]
use burn::tensor::DeviceKind;
#[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu"))]
use burn::tensor::DeviceType;

/// Kinds of device that Burn has, and whether this build has them: each is a feature.
const KINDS: [(&str, bool); 8] = [
    ("flex", cfg!(feature = "flex")),
    ("ndarray", cfg!(feature = "ndarray")),
    ("cpu", cfg!(feature = "cpu")),
    ("cuda", cfg!(feature = "cuda")),
    ("rocm", cfg!(feature = "rocm")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("metal", cfg!(feature = "metal")),
];

/// The kinds that this build has, and which of them a caller can use.
pub fn built(usable: impl Fn(&str) -> bool) -> String {
    let built = KINDS.iter().filter(|(kind, built)| *built && usable(kind)).map(|(kind, _)| *kind);
    built.collect::<Vec<_>>().join(", ")
}

/// A kind, and the index of a name like `cuda:1`.
pub fn parse(name: &str) -> (&str, Option<&str>) {
    match name.split_once(':') {
        None => (name, None),
        Some((kind, index)) => (kind, Some(index)),
    }
}

/// Opens a device: a kind, or a kind and an index as in `cuda:1`.
pub fn open(name: &str) -> Result<Device> {
    let (kind, index) = parse(name);
    if !KINDS.contains(&(kind, true)) {
        let built = built(|_| true);
        match KINDS.contains(&(kind, false)) {
            true => bail!(
                "this build has no device {kind:?}; it has: {built}; a build with `--features \
                 {kind}` has it"
            ),
            false => bail!("this build has no device {kind:?}; it has: {built}"),
        }
    }
    let found = find(kind).map_err(|reason| anyhow!("{kind} can't run here: {reason}"))?;
    let Some(index) = index else {
        return Ok(found.preferred);
    };
    let number: usize =
        index.parse().with_context(|| format!("{index:?} is no index of a {kind} device"))?;
    let count = found.all.len();
    let device = found.all.into_iter().nth(number);
    device.with_context(|| format!("there is no {kind}:{number}, this machine has {count}"))
}

/// Every kind with its device, or the reason why there is none.
pub fn every() -> impl Iterator<Item = (&'static str, Result<Device, String>)> {
    KINDS.into_iter().map(|(kind, built)| {
        let device = match built {
            true => find(kind).map(|found| found.preferred),
            false => Err(format!("not in this build (feature {kind})")),
        };
        (kind, device)
    })
}

/// Devices of one kind on this machine.
struct Found {
    /// Taken where no index is given.
    preferred: Device,
    /// By index.
    all: Vec<Device>,
}

/// What this machine has of a kind that this build has, or why it can't run it.
#[cfg_attr(feature = "ndarray", allow(deprecated))] // Burn deprecates ndarray, users still have it.
fn find(kind: &str) -> Result<Found, String> {
    match kind {
        #[cfg(feature = "flex")]
        "flex" => first(vec![Device::flex()], ""),
        #[cfg(feature = "ndarray")]
        "ndarray" => first(vec![Device::ndarray()], ""),
        #[cfg(feature = "cpu")]
        "cpu" => first(vec![Device::cpu()], ""),
        #[cfg(feature = "cuda")]
        "cuda" => {
            let all = Device::enumerate(DeviceType::Cuda).to_vec();
            let found = first(all, "the NVIDIA driver (libcuda) is missing or sees no GPU")?;
            crate::cuda::missing().map_or(Ok(found), Err)
        }
        #[cfg(feature = "rocm")]
        "rocm" => {
            let all = Device::enumerate(DeviceType::Rocm).to_vec();
            first(all, "the HIP runtime (libamdhip64) is missing or sees no GPU")
        }
        #[cfg(feature = "wgpu")]
        "wgpu" => adapters(DeviceType::Wgpu, Device::wgpu),
        #[cfg(feature = "vulkan")]
        "vulkan" => adapters(DeviceType::Vulkan, Device::vulkan),
        #[cfg(feature = "metal")]
        "metal" => adapters(DeviceType::Metal, Device::metal),
        _ => Err("not in this build".into()),
    }
}

fn first(all: Vec<Device>, none: &str) -> Result<Found, String> {
    match all.first().cloned() {
        Some(preferred) => Ok(Found { preferred, all }),
        None => Err(none.into()),
    }
}

/// Of a graphics API, which has a preference of its own.
#[cfg(feature = "wgpu")]
fn adapters(kind: DeviceType, preferred: fn(DeviceKind) -> Device) -> Result<Found, String> {
    let all = Device::enumerate(kind).to_vec();
    let found = first(all, "no graphics adapter found, not even a software one")?;
    Ok(Found { preferred: preferred(DeviceKind::DefaultDevice), ..found })
}
