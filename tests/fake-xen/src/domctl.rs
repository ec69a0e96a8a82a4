//! Domctls: from numbers and structures to the model. See [`crate::hypercall`].

use std::mem::offset_of;

use rustix::io::Errno;
use rxl_migrate::bitmap::PageBitmap;
use rxl_migrate::fake::{FakeDomain, VcpuPart};
use rxl_migrate::hypervisor::{
    CpuCap, CpuPolicy, Domain, DomainInfo, HvResult, PolicyError, SourceDomain, TargetDomain,
    TscInfo, VcpuState,
};
use rxl_migrate::x86::pv::VCPU_CONTEXT_BYTES;
use rxl_xen_sys::abi;

use crate::client::{Client, errno};
use crate::hypercall::{domain, unknown};
use crate::memory::{Block, ClientMemory, Hypercall};

/// Bytes of `xen_cpuid_leaf_t`, `xen_msr_entry_t` and `xen_domctl_vcpu_msr_t`.
const LEAF_BYTES: usize = size_of::<abi::xen_cpuid_leaf_t>();
const MSR_BYTES: usize = size_of::<abi::xen_msr_entry_t>();
const VCPU_MSR_BYTES: usize = size_of::<abi::xen_domctl_vcpu_msr_t>();
/// What the vCPUs of the model save with xsave: x87, SSE, AVX.
const XFEATURES: u64 = 7;
/// The version of the interface: Xen 4.17's.
const VERSION: u32 = 0x15;

/// Does the domctl at `address`.
pub(crate) fn domctl(client: &Client<'_>, address: u64) -> Hypercall<u64> {
    type Domctl = abi::xen_domctl;
    let mut whole = client.memory.read(address, size_of::<Domctl>())?;
    let mut arg = Block(whole.split_off(offset_of!(Domctl, u)));
    let head = Block(whole);
    if head.u32(offset_of!(Domctl, interface_version)) != VERSION {
        return Err(Errno::ACCESS);
    }
    let domain = domain(client, head.u16(offset_of!(Domctl, domain)))?;
    let command = head.u32(offset_of!(Domctl, cmd));
    let result = Call { client, memory: &client.memory, domain }.run(command, &mut arg);
    // Xen says more of some failures in the structure.
    client.memory.write(address + offset_of!(Domctl, u) as u64, &arg.0)?;
    result.map(|()| 0)
}

struct Call<'a> {
    client: &'a Client<'a>,
    memory: &'a ClientMemory,
    domain: FakeDomain,
}

fn done<T>(result: HvResult<T>) -> Hypercall<T> {
    result.map_err(|e| errno(&e))
}

fn count32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl Call<'_> {
    fn run(&self, command: u32, arg: &mut Block) -> Hypercall<()> {
        type Size = abi::xen_domctl_address_size;
        match command {
            abi::XEN_DOMCTL_getdomaininfo => self.info(arg),
            abi::XEN_DOMCTL_shadow_op => self.shadow_op(arg),
            abi::XEN_DOMCTL_getpageframeinfo3 => self.page_types(arg),
            abi::XEN_DOMCTL_get_address_size => {
                arg.put_u32(offset_of!(Size, size), done(self.domain.address_bits())?);
                Ok(())
            }
            abi::XEN_DOMCTL_set_address_size => {
                done(self.domain.set_address_bits(arg.u32(offset_of!(Size, size))))
            }
            abi::XEN_DOMCTL_getvcpuinfo => self.vcpu_info(arg),
            abi::XEN_DOMCTL_getvcpucontext => self.get_context(arg),
            abi::XEN_DOMCTL_setvcpucontext => self.set_context(arg),
            abi::XEN_DOMCTL_get_ext_vcpucontext => self.get_extended(arg),
            abi::XEN_DOMCTL_set_ext_vcpucontext => self.set_extended(arg),
            abi::XEN_DOMCTL_getvcpuextstate => self.get_xsave(arg),
            abi::XEN_DOMCTL_setvcpuextstate => self.set_xsave(arg),
            abi::XEN_DOMCTL_get_vcpu_msrs => self.get_msrs(arg),
            abi::XEN_DOMCTL_set_vcpu_msrs => self.set_msrs(arg),
            abi::XEN_DOMCTL_gethvmcontext => self.get_hvm_context(arg),
            abi::XEN_DOMCTL_sethvmcontext => self.set_hvm_context(arg),
            abi::XEN_DOMCTL_scheduler_op => self.scheduler_op(arg),
            abi::XEN_DOMCTL_gettscinfo => self.get_tsc(arg),
            abi::XEN_DOMCTL_settscinfo => self.set_tsc(arg),
            abi::XEN_DOMCTL_get_cpu_policy => self.get_policy(arg),
            abi::XEN_DOMCTL_set_cpu_policy => self.set_policy(arg),
            _ => unknown(self.client, format!("domctl {command}")),
        }
    }

    fn info(&self, arg: &mut Block) -> Hypercall<()> {
        type Info = abi::xen_domctl_getdomaininfo;
        let info: DomainInfo = done(self.domain.info())?;
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let reason = info.shutdown.map_or(0, |r| u32::from(r) << abi::XEN_DOMINF_shutdownshift);
        let flags = flag(info.hvm, abi::XEN_DOMINF_hvm_guest | abi::XEN_DOMINF_hap)
            | flag(info.paused, abi::XEN_DOMINF_paused)
            | flag(info.shutdown.is_some(), abi::XEN_DOMINF_shutdown)
            | reason;
        arg.put(offset_of!(Info, domain), &self.domain.domid().0.to_ne_bytes());
        arg.put_u32(offset_of!(Info, flags), flags);
        arg.put_u64(offset_of!(Info, tot_pages), info.total_pages);
        arg.put_u64(offset_of!(Info, max_pages), info.total_pages);
        arg.put_u64(offset_of!(Info, shared_info_frame), info.shared_info_mfn);
        arg.put_u32(offset_of!(Info, nr_online_vcpus), info.max_vcpu_id + 1);
        arg.put_u32(offset_of!(Info, max_vcpu_id), info.max_vcpu_id);
        Ok(())
    }

    /// The domain is under credit2, Xen's default.
    fn scheduler_op(&self, arg: &mut Block) -> Hypercall<()> {
        type Op = abi::xen_domctl_scheduler_op;
        let cap = offset_of!(Op, u) + offset_of!(abi::xen_domctl_sched_credit2, cap);
        if arg.u32(offset_of!(Op, sched_id)) != abi::XEN_SCHEDULER_CREDIT2 {
            return Err(Errno::INVAL);
        }
        match arg.u32(offset_of!(Op, cmd)) {
            abi::XEN_DOMCTL_SCHEDOP_getinfo => {
                arg.put(cap, &done(self.domain.cpu_cap())?.0.to_ne_bytes());
                Ok(())
            }
            abi::XEN_DOMCTL_SCHEDOP_putinfo => done(self.domain.set_cpu_cap(CpuCap(arg.u16(cap)))),
            op => unknown(self.client, format!("XEN_DOMCTL_scheduler_op {op}")),
        }
    }

    fn shadow_op(&self, arg: &mut Block) -> Hypercall<()> {
        type Op = abi::xen_domctl_shadow_op;
        match arg.u32(offset_of!(Op, op)) {
            abi::XEN_DOMCTL_SHADOW_OP_OFF => done(self.domain.log_dirty_off()),
            abi::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY => done(self.domain.log_dirty_on()),
            abi::XEN_DOMCTL_SHADOW_OP_CLEAN => {
                let pages = arg.u64(offset_of!(Op, pages));
                if pages >> 30 != 0 {
                    return Err(Errno::TOOBIG);
                }
                let last = arg.u32(offset_of!(Op, mode)) & abi::XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL;
                let mut dirty = PageBitmap::new(pages);
                done(self.domain.log_dirty_clean(&mut dirty, last != 0))?;
                let mut words = vec![0_u64; count_words(pages)];
                for pfn in dirty.iter() {
                    let index = pfn.index().unwrap_or(usize::MAX) / 64;
                    if let Some(word) = words.get_mut(index) {
                        *word |= 1 << (pfn.0 % 64);
                    }
                }
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                let length = usize::try_from(pages.div_ceil(8)).map_err(|_| Errno::TOOBIG)?;
                let bitmap = arg.u64(offset_of!(Op, dirty_bitmap));
                self.memory.write(bitmap, bytes.get(..length).unwrap_or(&bytes))?;
                let count = u32::try_from(dirty.count()).unwrap_or(u32::MAX);
                arg.put_u32(offset_of!(Op, stats.dirty_count), count);
                Ok(())
            }
            op => unknown(self.client, format!("XEN_DOMCTL_shadow_op {op}")),
        }
    }

    fn page_types(&self, arg: &Block) -> Hypercall<()> {
        type Info = abi::xen_domctl_getpageframeinfo3;
        let array = arg.u64(offset_of!(Info, array));
        let frames = self.memory.read_words(array, arg.u64(offset_of!(Info, num)))?;
        let kinds = done(self.domain.page_types(&frames))?;
        let word = |nibble: u8| u64::from(nibble) << abi::XEN_DOMCTL_PFINFO_LTAB_SHIFT;
        let words: Vec<u64> = kinds.iter().map(|kind| word(kind.nibble())).collect();
        self.memory.write_words(array, &words)
    }

    fn vcpu(&self, id: u32) -> Hypercall<VcpuState> {
        done(self.domain.vcpu(id))?.ok_or(Errno::INVAL)
    }

    fn vcpu_info(&self, arg: &mut Block) -> Hypercall<()> {
        type Info = abi::xen_domctl_getvcpuinfo;
        let vcpu = done(self.domain.vcpu(arg.u32(offset_of!(Info, vcpu))))?;
        arg.put(offset_of!(Info, online), &[u8::from(vcpu.is_some())]);
        Ok(())
    }

    fn get_context(&self, arg: &Block) -> Hypercall<()> {
        type Context = abi::xen_domctl_vcpucontext;
        let vcpu = self.vcpu(arg.u32(offset_of!(Context, vcpu)))?;
        self.memory.write(arg.u64(offset_of!(Context, ctxt)), &vcpu.basic)
    }

    fn set_context(&self, arg: &Block) -> Hypercall<()> {
        type Context = abi::xen_domctl_vcpucontext;
        let basic = self.memory.read(arg.u64(offset_of!(Context, ctxt)), VCPU_CONTEXT_BYTES)?;
        let state = VcpuState { basic, ..VcpuState::default() };
        done(self.domain.set_vcpu(arg.u32(offset_of!(Context, vcpu)), &state))
    }

    /// The structure itself is the state: vCPU, size, and so many bytes in all.
    fn get_extended(&self, arg: &mut Block) -> Hypercall<()> {
        let vcpu = self.vcpu(arg.u32(0))?;
        arg.put(0, &vcpu.extended);
        Ok(())
    }

    fn set_extended(&self, arg: &Block) -> Hypercall<()> {
        let size = arg.u32(4) as usize;
        let bytes = arg.0.get(..size).ok_or(Errno::INVAL)?;
        done(self.domain.set_vcpu_part(arg.u32(0), VcpuPart::Extended, bytes))
    }

    fn get_xsave(&self, arg: &mut Block) -> Hypercall<()> {
        type State = abi::xen_domctl_vcpuextstate;
        let vcpu = self.vcpu(arg.u32(offset_of!(State, vcpu)))?;
        let size = vcpu.xsave.len() as u64;
        match arg.u64(offset_of!(State, size)) {
            0 => {
                arg.put_u64(offset_of!(State, xfeature_mask), XFEATURES);
                arg.put_u64(offset_of!(State, size), size);
                Ok(())
            }
            room if room == size => {
                self.memory.write(arg.u64(offset_of!(State, buffer)), &vcpu.xsave)
            }
            _ => Err(Errno::INVAL),
        }
    }

    fn set_xsave(&self, arg: &Block) -> Hypercall<()> {
        type State = abi::xen_domctl_vcpuextstate;
        let size = usize::try_from(arg.u64(offset_of!(State, size))).map_err(|_| Errno::INVAL)?;
        let bytes = self.memory.read(arg.u64(offset_of!(State, buffer)), size)?;
        let vcpu = arg.u32(offset_of!(State, vcpu));
        done(self.domain.set_vcpu_part(vcpu, VcpuPart::Xsave, &bytes))
    }

    fn get_msrs(&self, arg: &mut Block) -> Hypercall<()> {
        type Msrs = abi::xen_domctl_vcpu_msrs;
        let vcpu = self.vcpu(arg.u32(offset_of!(Msrs, vcpu)))?;
        let count = count32(vcpu.msrs.len() / VCPU_MSR_BYTES);
        let (buffer, room) =
            (arg.u64(offset_of!(Msrs, msrs)), arg.u32(offset_of!(Msrs, msr_count)));
        arg.put_u32(offset_of!(Msrs, msr_count), count);
        match buffer {
            0 => Ok(()),
            _ if room < count => Err(Errno::NOBUFS),
            _ => self.memory.write(buffer, &vcpu.msrs),
        }
    }

    fn set_msrs(&self, arg: &Block) -> Hypercall<()> {
        type Msrs = abi::xen_domctl_vcpu_msrs;
        let count = arg.u32(offset_of!(Msrs, msr_count)) as usize;
        let bytes = self.memory.read(arg.u64(offset_of!(Msrs, msrs)), count * VCPU_MSR_BYTES)?;
        done(self.domain.set_vcpu_part(arg.u32(offset_of!(Msrs, vcpu)), VcpuPart::Msrs, &bytes))
    }

    fn get_hvm_context(&self, arg: &mut Block) -> Hypercall<()> {
        type Context = abi::xen_domctl_hvmcontext;
        let context = done(self.domain.hvm_context())?;
        let (buffer, room) =
            (arg.u64(offset_of!(Context, buffer)), arg.u32(offset_of!(Context, size)));
        let size = count32(context.len());
        arg.put_u32(offset_of!(Context, size), size);
        match buffer {
            0 => Ok(()),
            _ if room < size => Err(Errno::NOSPC),
            _ => self.memory.write(buffer, &context),
        }
    }

    fn set_hvm_context(&self, arg: &Block) -> Hypercall<()> {
        type Context = abi::xen_domctl_hvmcontext;
        let size = arg.u32(offset_of!(Context, size)) as usize;
        let context = self.memory.read(arg.u64(offset_of!(Context, buffer)), size)?;
        done(self.domain.set_hvm_context(&context))
    }

    fn get_tsc(&self, arg: &mut Block) -> Hypercall<()> {
        type Tsc = abi::xen_domctl_tsc_info;
        let tsc = done(self.domain.tsc_info())?;
        arg.put_u32(offset_of!(Tsc, tsc_mode), tsc.mode);
        arg.put_u32(offset_of!(Tsc, gtsc_khz), tsc.khz);
        arg.put_u32(offset_of!(Tsc, incarnation), tsc.incarnation);
        arg.put_u64(offset_of!(Tsc, elapsed_nsec), tsc.nsec);
        Ok(())
    }

    fn set_tsc(&self, arg: &Block) -> Hypercall<()> {
        type Tsc = abi::xen_domctl_tsc_info;
        let tsc = TscInfo {
            mode: arg.u32(offset_of!(Tsc, tsc_mode)),
            khz: arg.u32(offset_of!(Tsc, gtsc_khz)),
            nsec: arg.u64(offset_of!(Tsc, elapsed_nsec)),
            incarnation: arg.u32(offset_of!(Tsc, incarnation)),
        };
        done(self.domain.set_tsc_info(&tsc))
    }

    fn get_policy(&self, arg: &mut Block) -> Hypercall<()> {
        type Policy = abi::xen_domctl_cpu_policy;
        let policy = done(self.domain.cpu_policy())?;
        let counts = [policy.leaves.len() / LEAF_BYTES, policy.msrs.len() / MSR_BYTES].map(count32);
        let fields = [offset_of!(Policy, nr_leaves), offset_of!(Policy, nr_msrs)];
        if fields.iter().zip(counts).any(|(field, count)| arg.u32(*field) < count) {
            return Err(Errno::NOBUFS);
        }
        self.memory.write(arg.u64(offset_of!(Policy, leaves)), &policy.leaves)?;
        self.memory.write(arg.u64(offset_of!(Policy, msrs)), &policy.msrs)?;
        fields.into_iter().zip(counts).for_each(|(field, count)| arg.put_u32(field, count));
        Ok(())
    }

    fn set_policy(&self, arg: &mut Block) -> Hypercall<()> {
        type Policy = abi::xen_domctl_cpu_policy;
        let leaves = arg.u32(offset_of!(Policy, nr_leaves)) as usize * LEAF_BYTES;
        let msrs = arg.u32(offset_of!(Policy, nr_msrs)) as usize * MSR_BYTES;
        let policy = CpuPolicy {
            leaves: self.memory.read(arg.u64(offset_of!(Policy, leaves)), leaves)?,
            msrs: self.memory.read(arg.u64(offset_of!(Policy, msrs)), msrs)?,
        };
        let fault = match self.domain.set_cpu_policy(&policy) {
            Ok(()) => return Ok(()),
            Err(PolicyError::Hv(error)) => return Err(errno(&error)),
            Err(PolicyError::Refused { leaf, subleaf, msr }) => [leaf, subleaf, msr],
            // Xen takes away what it lacks and says nothing.
            Err(PolicyError::Lost(_)) => return Ok(()),
        };
        let fields = [
            offset_of!(Policy, err_leaf),
            offset_of!(Policy, err_subleaf),
            offset_of!(Policy, err_msr),
        ];
        fields.into_iter().zip(fault).for_each(|(field, what)| arg.put_u32(field, what));
        Err(Errno::INVAL)
    }
}

fn count_words(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).unwrap_or(0)
}
