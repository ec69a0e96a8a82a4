//! CPU policies in the form in which Xen gives them: leaves and MSRs in order, none twice, none
//! beyond the limits that the policy itself names (`xen/lib/x86/cpuid.h`, `msr.h`).

use super::rng::Rng;
use crate::hypervisor::CpuPolicy;

/// In the place of a subleaf: the leaf has none.
const NO_SUBLEAF: u32 = u32::MAX;
/// Leaves, and the highest leaf of their range where one says so in its first word.
const LEAVES: [(u32, Option<u32>); 6] = [
    (0, Some(1)),
    (1, None),
    (0x4000_0000, Some(0)),
    (0x4000_0100, Some(0)),
    (0x8000_0000, Some(0x8000_0001)),
    (0x8000_0001, None),
];
/// `MSR_INTEL_PLATFORM_INFO`, `MSR_ARCH_CAPABILITIES`.
const MSRS: [u32; 2] = [0xce, 0x10a];

/// A policy with some features or other.
pub(super) fn cpu_policy(rng: &mut Rng) -> CpuPolicy {
    let mut policy = CpuPolicy::default();
    for (leaf, limit) in LEAVES {
        // The hypervisor's own leaves have a limit and nothing else.
        let features = if limit == Some(0) { [0; 3] } else { [(); 3].map(|()| rng.next() as u32) };
        let first = limit.unwrap_or(rng.next() as u32);
        for word in [leaf, NO_SUBLEAF, first].into_iter().chain(features) {
            policy.leaves.extend(word.to_le_bytes());
        }
    }
    for msr in MSRS {
        let value = u64::from(rng.next() as u32);
        policy.msrs.extend(u64::from(msr).to_le_bytes());
        policy.msrs.extend(value.to_le_bytes());
    }
    policy
}
