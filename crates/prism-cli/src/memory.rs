//! Most memory that the program took.

use burn::tensor::Device;
use serde::Serialize;

use crate::output;

/// Peaks in bytes, `None` where nobody says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PeakMemory {
    /// Resident memory of the process: `VmHWM` of Linux.
    pub host_bytes: Option<u64>,
    /// What Burn's allocator held of the device whenever it was asked. It seldom gives any back.
    pub device_bytes: Option<u64>,
}

impl PeakMemory {
    /// Takes note of what is held now.
    pub fn note(&mut self, device: &Device) {
        let status = std::fs::read_to_string("/proc/self/status").ok();
        let host = status.as_deref().and_then(high_water_mark);
        let held = device.memory_pool_usage().map(|usage| usage.bytes_reserved);
        self.host_bytes = self.host_bytes.max(host);
        self.device_bytes = self.device_bytes.max(held);
    }

    /// Both, for people.
    pub fn describe(&self) -> String {
        let known = |bytes: Option<u64>| bytes.map_or("not known".into(), output::bytes);
        format!("host {}, device {}", known(self.host_bytes), known(self.device_bytes))
    }
}

/// Bytes that `/proc/self/status` gives as the most the process had in memory.
fn high_water_mark(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_high_water_mark_read_and_nothing_made_up() {
        let status = "VmPeak:\t  900 kB\nVmHWM:\t  123 kB\nVmRSS:\t  100 kB\n";
        assert_eq!(high_water_mark(status), Some(123 * 1024));
        assert_eq!(high_water_mark("VmHWM:\t12 pages\n"), None);
        assert_eq!(high_water_mark(""), None);
        assert_eq!(PeakMemory::default().describe(), "host not known, device not known");
    }
}
