//! Instructions that CubeCL has no name for: barriers in shared memory, named barriers, loads and
//! stores, shares of the register file. Addresses are those of the shared window, 32 bits.
//!
//! Operands are expressions, never `let mut` variables, which CubeCL would hand over by address.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

/// What a wait that never ends is cut off after, in nanoseconds, where waits are bounded.
const PATIENCE: u64 = 4_000_000_000;

/// Address of an array in the shared window.
#[cube]
pub(crate) fn shared_address(array: &Shared<[u32]>) -> u32 {
    generic_to_shared::<u32>(array.as_ptr())
}

/// A barrier whose phase ends after `count` arrivals.
#[cube]
pub(crate) fn barrier_init(barrier: u32, count: u32) {
    gpu_asm!(
        "mbarrier.init.shared::cta.b64 [{b}], {n};",
        b = in(_) barrier, n = in(_) count,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Makes new barriers known to the copy engine.
#[cube]
pub(crate) fn barriers_ready() {
    gpu_asm!(
        "fence.mbarrier_init.release.cluster;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Arrives, and lets the phase last until `bytes` were copied.
#[cube]
pub(crate) fn arrive_expecting(barrier: u32, bytes: u32) {
    gpu_asm!(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{b}], {n};",
        b = in(_) barrier, n = in(_) bytes,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

#[cube]
pub(crate) fn arrive(barrier: u32) {
    gpu_asm!(
        "mbarrier.arrive.shared::cta.b64 _, [{b}];",
        b = in(_) barrier,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Waits until the phase of this parity has ended; the one before the first counts as ended.
/// `bounded` traps after four seconds instead of hanging.
#[cube]
pub(crate) fn wait(barrier: u32, parity: u32, #[comptime] bounded: bool) {
    let code = comptime!(wait_code(bounded));
    gpu_asm!(
        "{code}", "// {b} {p}",
        b = in(_) barrier + 0u32, p = in(_) parity & 1u32,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

fn wait_code(bounded: bool) -> String {
    let poll = "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\n";
    if bounded {
        format!(
            "{{ .reg .pred done; .reg .u64 start, now;\nmov.u64 start, %%globaltimer;\nPOLL: {poll}\
             mov.u64 now, %%globaltimer; sub.u64 now, now, start;\nsetp.gt.u64 done, now, \
             {PATIENCE};\n@done trap;\nbra POLL;\nDONE: }}"
        )
    } else {
        format!("{{ .reg .pred done;\nPOLL: {poll}bra POLL;\nDONE: }}")
    }
}

/// Waits for `threads` of the cube at a named barrier.
#[cube]
pub(crate) fn meet(id: u32, #[comptime] threads: u32) {
    gpu_asm!(
        "bar.sync {id}, {n};",
        id = in(_) id, n = const threads,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Lets others that [`meet`] at a named barrier of `threads` go on.
#[cube]
pub(crate) fn let_go(id: u32, #[comptime] threads: u32) {
    gpu_asm!(
        "bar.arrive {id}, {n};",
        id = in(_) id, n = const threads,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Makes writes of this thread to shared memory visible to wgmma and bulk copies.
#[cube]
pub(crate) fn publish_to_async() {
    gpu_asm!(
        "fence.proxy.async.shared::cta;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

#[cube]
pub(crate) fn meet_warp() {
    gpu_asm!(
        "bar.warp.sync 0xffffffff;",
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Gives registers of this warpgroup back: each thread keeps `count`.
#[cube]
pub(crate) fn shrink_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.dec.sync.aligned.u32 {n};", n = const count, options(nomem));
}

/// Takes registers that others gave back: each thread of this warpgroup has `count`.
#[cube]
pub(crate) fn grow_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.inc.sync.aligned.u32 {n};", n = const count, options(nomem));
}

#[cube]
pub(crate) fn load(address: u32) -> u32 {
    let value: u32;
    gpu_asm!(
        "ld.shared.u32 {v}, [{a}];",
        v = out(_) value, a = in(_) address,
        options(explicit_mem, reads_address_space shared)
    );
    value
}

#[cube]
pub(crate) fn store(address: u32, value: u32) {
    gpu_asm!(
        "st.shared.u32 [{a}], {v};",
        a = in(_) address, v = in(_) value,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

#[cube]
pub(crate) fn store_min(address: u32, value: u32) {
    gpu_asm!(
        "red.shared.min.u32 [{a}], {v};",
        a = in(_) address, v = in(_) value,
        options(explicit_mem, reads_address_space shared, writes_address_space shared)
    );
}

/// Tells the assembler that one cube has a multiprocessor to itself, as `__launch_bounds__(n, 1)`
/// does: without that it ignores the shares of registers. CubeCL prints no second bound, so an
/// include line brings a macro that adds it.
#[cube]
pub(crate) fn one_cube_a_multiprocessor() {
    intrinsic!(|scope| {
        use cubecl::ir::prelude::Op;
        let header = "cuda_fp16.h>\n#undef __launch_bounds__\n\
                      #define __launch_bounds__(n) __attribute__((launch_bounds(n, 1)))\n//";
        let context = scope.ctx_mut();
        let op = cubecl_cpp::shared::signature::IncludeOp::new(context, header.to_string());
        let entry = scope.state().entry_func.get_operation();
        op.get_operation().insert_before(context, entry);
    })
}
