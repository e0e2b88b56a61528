//! Two or more cubes that run at the same time and reach each other's shared memory.

use cubecl::prelude::*;

/// Waits for all threads of the cluster.
#[cube]
pub(crate) fn meet() {
    gpu_asm!(
        "barrier.cluster.arrive.release;",
        "barrier.cluster.wait.acquire;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Arrives at the barrier that lies at this address in the shared memory of the cluster's cube `rank`.
///
/// The plain form: with `.release.cluster` the assembler adds a fence to each.
#[cube]
pub(crate) fn arrive_at(barrier: u32, rank: u32) {
    gpu_asm!(
        "{{ .reg .b32 there; mapa.shared::cluster.u32 there, {b}, {r}; mbarrier.arrive.shared::cluster.b64 _, [there]; }}",
        b = in(_) barrier, r = in(_) rank,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}
