//! One host as a QEMU process. Every flag here was found by trial; see the comments before
//! dropping one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::image::HostImages;
use crate::network::{inside, tap_name};
use crate::process::{ProcessId, output};

/// Memory of a host; it is taken from the machine only when touched.
const MEMORY_MIB: u32 = 4096;
const DOM0_MEMORY_MIB: u32 = 1024;

/// - `-smap,-smep`: QEMU 7.2 faults in Xen's PV entry path with SMAP, and dom0 dies;
/// - `-rdtscp`: it reports the wrong SVM exit code, and Xen injects #UD into the guest;
/// - `-xsave`: with XSAVE a PV dom0's vector registers are corrupted now and then.
const CPU: &str = "max,-smap,-smep,-rdtscp,-xsave";

/// What a host is made of.
#[derive(Clone, Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) images: &'a HostImages,
    pub(crate) state_dir: &'a Path,
    /// Number of this host, from 1.
    pub(crate) host: u8,
    pub(crate) hosts: u8,
    pub(crate) nics: u8,
    pub(crate) vcpus: u8,
}

impl Machine<'_> {
    /// Starts the host on a fresh overlay of the root disk; it outlives this program.
    pub(crate) fn start(&self) -> Result<ProcessId> {
        output(
            Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                .arg(self.images.root_disk())
                .arg(self.overlay()),
        )?;
        // What an earlier host has said must not be taken for this one's before QEMU is there.
        File::create(self.console_log())?;
        let errors = File::create(self.qemu_log())?;
        // The namespace's `ip` becomes QEMU, so the child's pid is QEMU's. A session of its own
        // keeps a terminal's hang-up away.
        let mut command = Command::new("setsid");
        let inner = inside("qemu-system-x86_64");
        command.arg(inner.get_program()).args(inner.get_args()).args(self.arguments());
        let child = command
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .context("Cannot start QEMU")?;
        ProcessId::of(child.id())
    }

    /// The host's serial console, as far as it has been written.
    pub(crate) fn console_log(&self) -> PathBuf {
        self.file("console.log")
    }

    /// Where QEMU's own words go.
    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.file("qemu.log")
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = [
            "-name",
            // With names for its threads: `load` looks for those of the processors.
            &format!("rxl-lab-host{},debug-threads=on", self.host),
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi,tb-size=512",
            "-cpu",
            CPU,
            "-smp",
            &self.vcpus.to_string(),
            "-m",
            &MEMORY_MIB.to_string(),
            "-display",
            "none",
            "-monitor",
            "none",
            "-serial",
            &format!("file:{}", self.console_log().display()),
            "-no-reboot",
            "-kernel",
            &self.images.xen().display().to_string(),
            "-append",
            &self.xen_command_line(),
            "-initrd",
            &self.multiboot_modules(),
            "-drive",
            &format!("file={},format=qcow2,if=virtio,cache=unsafe", self.overlay().display()),
        ]
        .map(str::to_owned)
        .to_vec();
        for nic in 0..self.nics {
            let tap = tap_name(nic, self.host);
            arguments.extend([
                "-netdev".to_owned(),
                format!("tap,id=nic{nic},ifname={tap},script=no,downscript=no,vhost=off"),
                "-device".to_owned(),
                format!(
                    "virtio-net-pci,netdev=nic{nic},mac=52:54:00:77:{nic:02x}:{:02x}",
                    self.host
                ),
            ]);
        }
        arguments
    }

    fn xen_command_line(&self) -> String {
        format!(
            "console=com1 com1=115200,8n1 dom0_mem={DOM0_MEMORY_MIB}M,max:{DOM0_MEMORY_MIB}M \
             dom0_max_vcpus={} bootscrub=0",
            self.vcpus
        )
    }

    /// Kernel with its command line, and initramfs. A comma ends a module, so none may be inside.
    fn multiboot_modules(&self) -> String {
        format!(
            "{} console=hvc0 mitigations=off rxl.host={} rxl.hosts={} rxl.nics={},{}",
            self.images.kernel().display(),
            self.host,
            self.hosts,
            self.nics,
            self.images.initramfs().display()
        )
    }

    fn overlay(&self) -> PathBuf {
        self.file("disk.qcow2")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.state_dir.join(format!("host{}-{name}", self.host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_arguments_second_nic_has_own_tap_and_address() {
        let images = HostImages::at(Path::new("/i"));
        let machine = Machine {
            images: &images,
            state_dir: Path::new("/s"),
            host: 2,
            hosts: 2,
            nics: 2,
            vcpus: 1,
        };
        let arguments = machine.arguments().join(" ");
        assert!(arguments.contains("-cpu max,-smap,-smep,-rdtscp,-xsave "));
        assert!(arguments.contains("ifname=host2-nic1,script=no,downscript=no,vhost=off"));
        assert!(arguments.contains("mac=52:54:00:77:01:02"));
        assert!(arguments.contains("dom0_max_vcpus=1"));
        assert_eq!(machine.multiboot_modules().matches(',').count(), 1);
    }
}
