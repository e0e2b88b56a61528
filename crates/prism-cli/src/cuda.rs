//! What CubeCL needs of the CUDA toolkit at run time. It compiles kernels on the machine that runs
//! them and panics in the middle of a kernel where a piece is missing, so ask first.

/// The piece that is missing, and where it was looked for.
#[cfg(feature = "cuda-cpp")]
pub fn missing() -> Option<String> {
    const HEADER: &str = "cuda_fp16.h";
    // SAFETY: tries to load the library under each of its names and calls nothing in it.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Some("NVRTC (libnvrtc.so of the CUDA toolkit) is not on the library path".into());
    }
    let Some(root) = cubecl::cuda::install::cuda_path() else {
        return Some(
            "the CUDA headers are missing: set CUDA_PATH to the toolkit (looked for \
             /usr/local/cuda, /opt/cuda and /usr/bin/nvcc)"
                .into(),
        );
    };
    let header = root.join("include").join(HEADER);
    if header.is_file() {
        return None;
    }
    Some(format!("no {}: set CUDA_PATH to a toolkit with its headers", header.display()))
}

/// The piece that is missing, and where it was looked for: CubeCL's own compiler links `exp`, `log`
/// and their like from the toolkit.
#[cfg(not(feature = "cuda-cpp"))]
pub fn missing() -> Option<String> {
    use std::path::PathBuf;

    let roots = match std::env::var_os("CUDA_PATH") {
        Some(root) => vec![PathBuf::from(root)],
        None => ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"].map(Into::into).into(),
    };
    let has = |root: &PathBuf| root.join("nvvm/libdevice/libdevice.10.bc").is_file();
    if roots.iter().any(has) {
        return None;
    }
    let looked: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
    Some(format!(
        "nvvm/libdevice/libdevice.10.bc of the CUDA toolkit is missing: set CUDA_PATH (looked in {})",
        looked.join(", ")
    ))
}
