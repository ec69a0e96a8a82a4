//! Shows what rxl sees of a running domain, and so whether it can work on this host:
//! `probe DOMID`, in dom0. It only reads.

use std::collections::BTreeMap;
use std::error::Error;

use rxl_migrate::frame::{DomId, INVALID_FRAME, PageBuf, Pfn};
use rxl_migrate::hypervisor::{
    Access, BATCH_PAGES_MAX, Domain, DomainInfo, ForeignPages, SourceDomain,
};
use rxl_migrate::x86::{hvm, pv};
use rxl_toolstack::xc::{LiveDomain, Mapping};

/// Machine frames that a page of the machine-to-physical table describes.
const M2P_ENTRIES: u64 = 512;

#[expect(clippy::print_stdout, reason = "it is there to print")]
fn main() -> Result<(), Box<dyn Error>> {
    let domid = std::env::args().nth(1).ok_or("usage: probe DOMID")?.parse()?;
    let domain = LiveDomain::open(DomId(domid))?;
    let info = domain.info()?;
    let (major, minor) = domain.xen_version()?;
    println!("Xen {major}.{minor}, domctl interface {:#x}", domain.domctl_version());
    println!("{info:?}");
    println!("maximum gpfn {:#x}", domain.maximum_gpfn()?);
    println!("{:?}", domain.tsc_info()?);
    let policy = domain.cpu_policy()?;
    println!("CPU policy: {} leaves, {} MSRs", policy.leaves.len() / 24, policy.msrs.len() / 16);
    let frames = if info.hvm {
        show_hvm(&domain)?;
        (0..=domain.maximum_gpfn()?).take(BATCH_PAGES_MAX).collect()
    } else {
        show_pv(&domain, &info)?
    };
    show_batch(&domain, &frames)
}

#[expect(clippy::print_stdout, reason = "it is there to print")]
fn show_hvm(domain: &LiveDomain) -> Result<(), Box<dyn Error>> {
    println!("HVM context: {} bytes", domain.hvm_context()?.len());
    for index in hvm::SENT {
        println!("HVM parameter {index}: {:#x}", domain.hvm_param(index)?);
    }
    Ok(())
}

/// Shows what only a PV guest has; the first of its frames come back, by what Xen's table says.
#[expect(clippy::print_stdout, reason = "it is there to print")]
fn show_pv(domain: &LiveDomain, info: &DomainInfo) -> Result<Vec<u64>, Box<dyn Error>> {
    println!("{}-bit guest", domain.address_bits()?);
    for id in 0..=info.max_vcpu_id {
        println!("vCPU {id}: {:?}", domain.vcpu(id)?);
    }
    let shared = domain.map(&[info.shared_info_mfn], Access::Read)?;
    let max_pfn = shared.read_u64(pv::shared_info::MAX_PFN / 8);
    println!("shared info: {max_pfn:#x} pfns");
    let m2p = domain.map_m2p()?;
    let hosts_frames = m2p.page_count() as u64 * M2P_ENTRIES;
    println!("machine-to-physical table: {} pages", m2p.page_count());
    own_frames(domain, &m2p, hosts_frames, max_pfn)
}

/// Up to a batch of frames that are the domain's. The table says which pfn a frame is in whatever
/// domain owns it, so those that Xen will not map here are somebody else's.
fn own_frames(
    domain: &LiveDomain,
    m2p: &Mapping,
    end: u64,
    max_pfn: u64,
) -> Result<Vec<u64>, Box<dyn Error>> {
    let mut own = Vec::new();
    for mfn in 0..end {
        let pfn = Pfn(m2p.read_u64(usize::try_from(mfn)?));
        if pfn.0 < max_pfn && pfn.0 != INVALID_FRAME && domain.map(&[mfn], Access::Read).is_ok() {
            own.push(mfn);
        }
        if own.len() == BATCH_PAGES_MAX {
            break;
        }
    }
    Ok(own)
}

/// Shows the types of `frames` and maps those that have content.
#[expect(clippy::print_stdout, reason = "it is there to print")]
fn show_batch(domain: &LiveDomain, frames: &[u64]) -> Result<(), Box<dyn Error>> {
    let types = domain.page_types(frames)?;
    let mut census = BTreeMap::new();
    for kind in &types {
        *census.entry(format!("{kind:?}")).or_insert(0) += 1;
    }
    println!("{} frames: {census:?}", frames.len());
    let with_data: Vec<u64> = frames
        .iter()
        .zip(&types)
        .filter_map(|(frame, kind)| kind.has_data().then_some(*frame))
        .collect();
    let pages = domain.map(&with_data, Access::Read)?;
    let mut page = PageBuf::zeroed();
    let zeros = (0..pages.page_count())
        .filter(|index| {
            pages.read_page(*index, &mut page);
            page.words().all(|word| word == 0)
        })
        .count();
    println!("{} mapped, {zeros} of them all zeros", pages.page_count());
    Ok(())
}
