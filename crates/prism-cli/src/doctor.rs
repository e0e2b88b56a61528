//! `prism doctor`: what this machine can run, and why not the rest.

use anyhow::Result;
use burn::tensor::{DType, Device};
use burn_prism::plan::{Kernel, kernel};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::{device, output};

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    threads: usize,
    memory_bytes: u64,
    free_memory_bytes: u64,
    cpu_features: Vec<&'static str>,
    devices: Vec<DeviceReport>,
    /// Devices that Burn has and this build or machine doesn't, with the reason.
    missing: Vec<Missing>,
    hub: bool,
}

#[derive(Debug, Serialize)]
struct DeviceReport {
    name: &'static str,
    kernel: Kernel,
    dtypes: Vec<&'static str>,
    sparse_from: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Missing {
    name: &'static str,
    reason: String,
}

pub fn run(args: &DoctorArgs) -> Result<()> {
    let report = examine();
    if args.json {
        return output::json(&report);
    }
    println!("prism {}", report.version);
    println!(
        "{} threads, {} memory ({} free), CPU: {}",
        report.threads,
        output::bytes(report.memory_bytes),
        output::bytes(report.free_memory_bytes),
        if report.cpu_features.is_empty() {
            "baseline".into()
        } else {
            report.cpu_features.join(" ")
        },
    );
    let mut table = output::table(&["device", "computed by", "element types", "sparse from"]);
    for device in &report.devices {
        table.add_row([
            device.name.to_string(),
            device.kernel.to_string(),
            device.dtypes.join(" "),
            device.sparse_from.map_or("never by itself".into(), |keys| format!("{keys} keys")),
        ]);
    }
    println!("{table}");
    for missing in &report.missing {
        println!("{}: {}", missing.name, missing.reason);
    }
    Ok(())
}

fn examine() -> Report {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let (mut devices, mut missing) = (Vec::new(), Vec::new());
    for (name, device) in device::every() {
        match device {
            Ok(device) => devices.push(report(name, &device)),
            Err(reason) => missing.push(Missing { name, reason }),
        }
    }
    Report {
        version: env!("CARGO_PKG_VERSION"),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: system.total_memory(),
        free_memory_bytes: system.available_memory(),
        cpu_features: cpu_features(),
        devices,
        missing,
        hub: cfg!(feature = "hub"),
    }
}

fn report(name: &'static str, device: &Device) -> DeviceReport {
    let types = [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)];
    let dtypes = types.into_iter().filter(|&(_, dtype)| device.supports_dtype(dtype));
    let kernel = kernel(device);
    DeviceReport {
        name,
        kernel,
        dtypes: dtypes.map(|(name, _)| name).collect(),
        sparse_from: kernel.crossover(),
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let all = [
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
    ];
    all.into_iter().filter(|&(_, has)| has).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}
