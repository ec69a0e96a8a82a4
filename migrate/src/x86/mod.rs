//! What is particular to x86 guests: PV page tables and p2m, vCPU contexts, HVM parameters, CPUID.

pub mod cpuid;
pub mod hvm;
pub mod pv;
