//! Every step and rung on the CubeCL devices of the build, beside Burn's own attention.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_prism::{PrismConfig, SelectorConfig};
use clap::Parser;
use prism_bench::attention::{self, Call, Draw, Peer, Shape};
use prism_bench::selectors::{self, Heads, Method};
use prism_bench::{Budget, Gpu, Log, Run};
use prism_kernels::Element;

/// Bytes of scores that Burn's attention may take: where its flash kernel can't run, and while it
/// tries which is quicker, it holds all of them.
const SCORES: usize = 8 << 30;
/// The step that is timed in Burn's operations.
const CHOOSE: &str = "choose";

#[derive(Parser)]
struct Arguments {
    /// Devices, of those that the build has.
    #[arg(long, value_delimiter = ',')]
    devices: Vec<String>,
    /// Longest prompt, in tokens; by default what the device is quick enough for.
    #[arg(long)]
    longest: Option<usize>,
    /// Widths of a head.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128])]
    dims: Vec<usize>,
    /// Densities of sparse attention.
    #[arg(long, value_delimiter = ',', default_values_t = [0.05, 0.1, 0.3])]
    densities: Vec<f64>,
    /// Only these steps: rotate, pool, calibrate, score, select, schedule, dense, attend, and choose, which is
    /// pooling and selecting by every method.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Seconds a device.
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    /// Where the results go, a folder a device.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"))]
    out: PathBuf,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Times the devices that these arguments ask for, the first of them the program's name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let arguments = Arguments::parse_from(args);
    let built: Vec<(&str, cubecl::Device, Device)> = vec![
        #[cfg(feature = "cpu")]
        ("cpu", cubecl::Device::Cpu(Default::default()), Device::cpu()),
        #[cfg(feature = "wgpu")]
        (
            "wgpu",
            cubecl::Device::Wgpu(Default::default()),
            Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        ),
        #[cfg(feature = "cuda")]
        ("cuda", cubecl::Device::Cuda(Default::default()), Device::cuda(0)),
    ];
    let names: Vec<&str> = built.iter().map(|(name, ..)| *name).collect();
    for name in &arguments.devices {
        ensure!(names.contains(&name.as_str()), "no device {name:?}, this build has {names:?}");
    }
    for (name, device, burn) in built {
        if arguments.devices.is_empty() || arguments.devices.iter().any(|asked| asked == name) {
            on(name, &Gpu::new(device.client()), &burn, &arguments)?;
        }
    }
    Ok(())
}

fn on(name: &str, gpu: &Gpu, burn: &Device, arguments: &Arguments) -> Result<()> {
    let capabilities = &gpu.capabilities;
    println!("{name}: {capabilities:?}");
    let element = if capabilities.mma_bf16 { Element::BF16 } else { Element::F32 };
    let (heads, longest) = match (capabilities.mma_bf16, capabilities.cores) {
        (true, _) => ((32, 8), 128 << 10),
        (false, None) => ((8, 2), 8 << 10),
        (false, Some(_)) => ((4, 1), 2 << 10),
    };
    let longest = arguments.longest.unwrap_or(longest);
    let lengths: Vec<usize> = (10..=17).map(|bits| 1 << bits).filter(|&n| n <= longest).collect();
    ensure!(
        !lengths.is_empty(),
        "the shortest prompt has 1024 tokens, the longest asked {longest}"
    );
    let shape = |&dim: &usize, &len: &usize| Shape::new(heads.0, heads.1, len, dim, element);
    let shapes: Vec<Shape> = (arguments.dims.iter())
        .flat_map(|dim| lengths.iter().map(|len| shape(dim, len)).collect::<Vec<_>>())
        .collect();
    let chooses = |step: &String| step == CHOOSE;
    let steps: Vec<String> =
        arguments.only.iter().filter(|&step| !chooses(step)).cloned().collect();
    let budget = Budget {
        seconds: arguments.seconds,
        window: 200.0,
        slowest: 1500.0,
        only: steps.clone(),
        ..Budget::default()
    };
    let prepare = |shape: &Shape| burns(shape, burn);
    let peers = [Peer { name: "burn", prepare: &prepare }];
    let mut run = Run {
        gpu: std::env::var("PRISM_GPU").unwrap_or_else(|_| name.to_string()),
        command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        ..Run::default()
    };
    let out = arguments.out.join(name);
    let mut tell = |run: &Run, line: &str| {
        println!("{line}");
        run.write(&out)
    };
    let mut log = Log::new(&mut run, &mut tell);
    let all = arguments.only.is_empty();
    if all || !steps.is_empty() {
        attention::time(gpu, &shapes, &Draw::new(&arguments.densities), &budget, &peers, &mut log)?;
    }
    if all || arguments.only.iter().any(chooses) {
        let methods = SelectorConfig::all().map(|selector| Method {
            name: selector.name().into(),
            config: PrismConfig::llama3().with_selector(selector),
        });
        let budget = Budget { only: Vec::new(), ..budget };
        for &head_dim in &arguments.dims {
            let dtype = dtype(element);
            let heads = Heads { q_heads: heads.0, kv_heads: heads.1, head_dim, dtype };
            selectors::time(burn, heads, &lengths, &methods, &budget, &mut log)?;
        }
    }
    run.write(&out)?;
    println!("{}", run.markdown());
    println!("table.md, records.csv, run.json and plots are in {}", out.display());
    Ok(())
}

fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        Element::BF16 => DType::BF16,
    }
}

/// Burn's own attention of random Q, K and V, K and V repeated for the heads of a group: it takes
/// as many heads of each, and its flash kernel only the default scale and lengths that its tiles
/// divide, which ours here do.
fn burns(shape: &Shape, device: &Device) -> Result<Call> {
    let dtype = dtype(shape.element);
    let scores = shape.q_heads * shape.len * shape.len * 4;
    if scores > SCORES {
        bail!(
            "Burn's attention may hold all scores, {:.0} GiB, here at most {}",
            scores as f64 / f64::from(1 << 30),
            SCORES >> 30
        );
    }
    let random = || {
        let dims = [1, shape.q_heads, shape.len, shape.dim];
        Tensor::<4>::random(dims, Distribution::Normal(0.0, 1.0), (device, dtype))
    };
    let (q, k, v) = (random(), random(), random());
    let device = device.clone();
    Ok(Box::new(move || {
        let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
        let out = attention(q.clone(), k.clone(), v.clone(), None, None, options);
        // Operations are lazy until they are waited for.
        device.sync().expect("the operations ran");
        std::hint::black_box(out);
    }))
}
