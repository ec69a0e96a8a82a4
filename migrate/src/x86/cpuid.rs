//! Features of a CPU as CPUID leaves say them: what a guest had and is not given.
//!
//! What it is not: Xen's rules. Which features a host can give a guest is asked of its Xen, which
//! takes away what it cannot give without an error.
//!
//! The leaves are `xen_cpuid_leaf_t` of `xen/lib/x86/cpu-policy.h`: leaf, subleaf, and the
//! registers eax, ebx, ecx, edx, 32 bits each, little-endian. The names are Linux'.

use std::fmt;

/// Bytes of a leaf.
const LEAF_BYTES: usize = 24;
/// In the place of a subleaf: the leaf has none.
const NO_SUBLEAF: u32 = u32::MAX;

/// A register of feature bits.
struct Register {
    leaf: u32,
    subleaf: u32,
    /// 0 to 3: eax to edx.
    index: usize,
    /// Bits that Xen takes from the host, whatever the guest had: no feature, but a behaviour.
    hosts: u32,
    /// Names of the bits from 0 on; `-` and what is missing have none.
    names: &'static str,
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// The registers that hold features and nothing else.
const REGISTERS: [Register; 16] = [
    register(
        1,
        NO_SUBLEAF,
        EDX,
        "\
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts \
        acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    register(
        1,
        NO_SUBLEAF,
        ECX,
        "\
        pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - \
        pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c \
        rdrand hypervisor",
    ),
    // fdp_excptn_only and zero_fcs_fds: see `recalculate_cpuid_policy`.
    Register {
        hosts: 1 << 6 | 1 << 13,
        ..register(
            7,
            0,
            EBX,
            "\
        fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
        zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb \
        intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
        )
    },
    register(
        7,
        0,
        ECX,
        "\
        prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
        avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect \
        cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    register(
        7,
        0,
        EDX,
        "\
        - - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear - - \
        tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
        avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities \
        core_capabilities ssbd",
    ),
    register(7, 1, EAX, "- - - - avx_vnni avx512_bf16"),
    register(7, 1, EBX, ""),
    register(7, 1, ECX, ""),
    register(7, 1, EDX, ""),
    register(7, 2, EDX, ""),
    register(0xd, 1, EAX, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    register(
        0x8000_0001,
        NO_SUBLEAF,
        EDX,
        "\
        fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - \
        mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    register(
        0x8000_0001,
        NO_SUBLEAF,
        ECX,
        "\
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop \
        skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc \
        perfctr_llc mwaitx",
    ),
    register(0x8000_0007, NO_SUBLEAF, EDX, "- - - - - - - - constant_tsc"),
    register(
        0x8000_0008,
        NO_SUBLEAF,
        EBX,
        "\
        clzero irperf xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs stibp",
    ),
    register(0x8000_0021, NO_SUBLEAF, EAX, ""),
];

const fn register(leaf: u32, subleaf: u32, index: usize, names: &'static str) -> Register {
    Register { leaf, subleaf, index, hosts: 0, names }
}

/// A feature that a guest had and is not given. It reads as
/// `CPUID leaf 0x7 subleaf 0 ebx bit 18 (rdseed)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    leaf: u32,
    subleaf: u32,
    register: usize,
    bit: u32,
}

/// The first feature of the leaves `had` that the leaves `given` lack; `None`: they have all.
#[must_use]
pub fn lost(had: &[u8], given: &[u8]) -> Option<Feature> {
    REGISTERS.iter().find_map(|register| {
        let Register { leaf, subleaf, index, hosts, .. } = *register;
        let missing = register.of(had) & !register.of(given) & !hosts;
        let bit = missing.trailing_zeros();
        (missing != 0).then_some(Feature { leaf, subleaf, register: index, bit })
    })
}

impl Register {
    /// Its value in `leaves`; 0 where the leaf is not there.
    fn of(&self, leaves: &[u8]) -> u32 {
        let words = leaves.as_chunks::<LEAF_BYTES>().0.iter().map(|leaf| {
            let words = leaf.as_chunks::<4>().0;
            let word = |at: usize| words.get(at).map_or(0, |word| u32::from_le_bytes(*word));
            (word(0), word(1), word(2 + self.index))
        });
        let mut here = words.filter(|(leaf, subleaf, _)| (*leaf, *subleaf) == self.place());
        here.next().map_or(0, |(_, _, value)| value)
    }

    fn place(&self) -> (u32, u32) {
        (self.leaf, self.subleaf)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Feature { leaf, subleaf, register, bit } = *self;
        write!(f, "CPUID leaf {leaf:#x}")?;
        if subleaf != NO_SUBLEAF {
            write!(f, " subleaf {subleaf}")?;
        }
        let letters = ["eax", "ebx", "ecx", "edx"];
        write!(f, " {} bit {bit}", letters.get(register).unwrap_or(&"?"))?;
        let is_it = |r: &&Register| r.place() == (leaf, subleaf) && r.index == register;
        let name = REGISTERS.iter().find(is_it).and_then(|r| {
            r.names.split_ascii_whitespace().nth(bit as usize).filter(|name| *name != "-")
        });
        name.map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: u32, registers: [u32; 4]) -> Vec<u8> {
        [leaf, subleaf].into_iter().chain(registers).flat_map(u32::to_le_bytes).collect()
    }

    fn text(had: &[u8], given: &[u8]) -> Option<String> {
        lost(had, given).map(|feature| feature.to_string())
    }

    #[test]
    fn a_feature_that_is_not_given_is_named() {
        let had = [leaf(1, NO_SUBLEAF, [7, 7, 1 << 30, 0]), leaf(7, 0, [0, 1 << 18, 1, 0])];
        let given = leaf(7, 0, [0, 0, 1, 0]);
        let name = "CPUID leaf 0x7 subleaf 0 ebx bit 18 (rdseed)";
        let (had, first) = (had.concat(), leaf(1, NO_SUBLEAF, [0, 0, 1 << 30, 0]));
        assert_eq!(text(&had, &[first, given.clone()].concat()).as_deref(), Some(name));
        // A leaf that is not there has no features.
        let name = "CPUID leaf 0x1 ecx bit 30 (rdrand)";
        assert_eq!(text(&had, &given).as_deref(), Some(name));
        let had = leaf(0x8000_0021, NO_SUBLEAF, [1 << 31, 0, 0, 0]);
        assert_eq!(text(&had, &[]).as_deref(), Some("CPUID leaf 0x80000021 eax bit 31"));
    }

    #[test]
    fn more_than_it_had_other_fields_and_the_hosts_own_bits_do_not_matter() {
        // The maximal subleaf (eax of leaf 7), the APIC number (ebx of leaf 1).
        let had = [leaf(1, NO_SUBLEAF, [9, 9, 2, 3]), leaf(7, 0, [2, 1 << 6 | 1 << 13, 0, 0])];
        let given = [leaf(1, NO_SUBLEAF, [0, 0, 3, 7]), leaf(7, 0, [0, 1, 1, 1])];
        assert_eq!(lost(&had.concat(), &given.concat()), None);
    }

    #[test]
    fn each_register_has_at_most_32_names_and_each_bit_a_line() {
        for register in &REGISTERS {
            assert!(register.names.split_ascii_whitespace().count() <= 32, "{:#x}", register.leaf);
        }
        let bit = |leaf, subleaf, register, bit| Feature { leaf, subleaf, register, bit };
        let ends_with = |feature: Feature, name| feature.to_string().ends_with(name);
        assert!(ends_with(bit(1, NO_SUBLEAF, EDX, 26), "(sse2)"));
        assert!(ends_with(bit(7, 0, EBX, 31), "(avx512vl)"));
        assert!(ends_with(bit(7, 0, ECX, 31), "(pks)"));
        assert!(ends_with(bit(7, 0, EDX, 31), "(ssbd)"));
        assert!(ends_with(bit(0x8000_0001, NO_SUBLEAF, EDX, 29), "(lm)"));
        assert!(ends_with(bit(0x8000_0001, NO_SUBLEAF, ECX, 29), "(mwaitx)"));
        assert!(ends_with(bit(1, NO_SUBLEAF, EDX, 10), "bit 10"));
    }
}
