//! `cargo bench --bench kernels --features cpu`, or `wgpu`, `cuda`: every step and rung that the device
//! runs, over length, density and head_dim, beside Burn's own attention. Times are the device's own where
//! it keeps them; the table, a CSV, a JSON and plots go to `target/bench`.

#[cfg(not(feature = "kernels"))]
fn main() {
    println!("no CubeCL device in this build: --features cpu, wgpu, cuda or cuda-cpp adds one");
}

#[cfg(feature = "kernels")]
fn main() -> anyhow::Result<()> {
    benches::run(std::env::args_os())
}
