//! What a GPU machine is asked, and what it answered.

pub mod data;
pub mod matmul;
mod million;
pub mod report;
pub mod time;

use cubecl::client::Client;
use prism_kernels::Capabilities;

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
}
