//! Sizes of launches.

use cubecl::prelude::*;

/// Launches a kernel: `launch!(kernel, client, cube_count, cube_dim, arguments..)`. While
/// [`offline`](crate::offline) records, the kernel's CUDA source is written down instead, so that
/// what is checked without a GPU is just what would have run.
macro_rules! launch {
    ($kernel:ident, $client:expr, $count:expr, $dim:expr, $($argument:expr),* $(,)?) => {{
        #[cfg(feature = "offline")]
        if let Some(target) = crate::offline::recording() {
            let kernel = $kernel::create_dummy_kernel(
                target.device.clone(), target.target.clone(), $count, $dim, $($argument),*
            );
            crate::offline::record(stringify!($kernel), kernel);
        } else {
            $kernel::launch_unchecked($client, $count, $dim, $($argument),*);
        }
        #[cfg(not(feature = "offline"))]
        $kernel::launch_unchecked($client, $count, $dim, $($argument),*);
    }};
}
pub(crate) use launch;

/// `cubes` cubes in as few dims as the device's limits allow; kernels return where `CUBE_POS`
/// exceeds their work.
pub(crate) fn cube_count(client: &Client, cubes: usize) -> CubeCount {
    let (x, y, _) = client.properties().hardware.max_cube_count;
    let (x, y) = (x as usize, y as usize);
    if cubes <= x {
        return CubeCount::Static(cubes as u32, 1, 1);
    }
    // Rather square than long: fewer cubes without work.
    let width = x.min(1 << 15);
    let height = cubes.div_ceil(width);
    if height <= y {
        return CubeCount::Static(width as u32, height as u32, 1);
    }
    CubeCount::Static(width as u32, y as u32, height.div_ceil(y) as u32)
}

/// `size`, cut to what vectors of the device hold.
pub(crate) fn widest(client: &Client, size: usize) -> usize {
    size.min(client.properties().hardware.max_vector_size)
}
