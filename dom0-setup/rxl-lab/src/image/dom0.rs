//! A host's own Linux: root disk, kernel and initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::keys::{HOST_KEY, KNOWN_HOSTS, USER_KEY};
use crate::cpio::Archive;
use crate::debian::Mirror;
use crate::process::{output, output_with_input};
use crate::progress::step;
use crate::release::Release;
use crate::store::ImageKey;

pub(super) const KERNEL: &str = "vmlinuz";
pub(super) const INITRAMFS: &str = "initramfs.cpio";
pub(super) const ROOT_DISK: &str = "root.ext4";

const KERNEL_PACKAGE: &str = "linux-image-amd64";
const ROOT_DISK_SIZE: &str = "3G";

/// Where a host keeps the kernel that its guests boot.
pub(crate) const GUEST_KERNEL_PATH: &str = "/var/lib/rxl-lab/vmlinuz";

/// Packages of a host beside the minimal system and those that have Xen's number in their names.
/// The libraries that a Rust toolstack links or loads are named, so that they stay when a package
/// stops depending on them.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libxencall1",
    "libxendevicemodel1",
    "libxenevtchn1",
    "libxenforeignmemory1",
    "libxengnttab1",
    "libxentoollog1",
    "openssh-client",
    "openssh-server",
    "procps",
    "psmisc",
    "qemu-system-xen",
    "socat",
    "strace",
    "xen-utils-common",
    "xenstore-utils",
];

/// Those; the number follows.
const XEN_PACKAGES: [&str; 2] = ["libxenmisc", "xen-utils-"];

/// What the initramfs must load before the root disk and the network are there.
const INITRAMFS_MODULES: &[&str] =
    &["virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4"];

const INITRAMFS_INIT: &str = include_str!("../../recipe/initramfs-init");
const BOOT_SCRIPT: &str = include_str!("../../recipe/rxl-lab-boot");
const INITTAB: &str = include_str!("../../recipe/inittab");
const SSHD_CONFIG: &str = include_str!("../../recipe/sshd_config");
const SSH_CONFIG: &str = include_str!("../../recipe/ssh_config");

/// Raise it when the steps below change in a way that changes what they make.
const RECIPE: &str = "1";

/// `keys` are the lab's.
pub(super) fn key(release: Release, keys: &Path) -> ImageKey {
    let packages = packages(release);
    let keys = keys.file_name().unwrap_or_default().to_string_lossy();
    let mut parts = vec![RECIPE, release.suite(), &keys, KERNEL_PACKAGE, ROOT_DISK_SIZE];
    parts.extend(packages.iter().map(String::as_str));
    parts.extend(INITRAMFS_MODULES);
    parts.extend([INITRAMFS_INIT, BOOT_SCRIPT, INITTAB, SSHD_CONFIG, SSH_CONFIG]);
    ImageKey::over(parts.into_iter().map(str::as_bytes))
}

pub(super) fn build(release: Release, keys: &Path, image: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(image)?;
    let root = scratch.path().join("root");
    let mirror = Mirror::of(release)?;
    step("installed Debian for the hosts", || install_debian(release, &mirror, &root))?;
    let kernel = step("unpacked the kernel", || install_kernel(&mirror, image, &root))?;
    install_keys(keys, &root)?;
    configure(&root)?;
    step("packed the root disk", || {
        write_initramfs(&root.join("lib/modules").join(&kernel), &image.join(INITRAMFS))?;
        let disk = image.join(ROOT_DISK);
        output(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal", "-d"]).args([
            root.as_os_str(),
            disk.as_os_str(),
            ROOT_DISK_SIZE.as_ref(),
        ]))
    })?;
    let listing = fs::read_to_string(root.join("var/lib/dpkg/status"))?;
    fs::write(image.join("versions"), format!("linux {kernel}\n{}", xen_versions(&listing)))?;
    Ok(())
}

fn packages(release: Release) -> Vec<String> {
    let of_xen = XEN_PACKAGES.iter().map(|name| format!("{name}{release}"));
    PACKAGES.iter().map(|name| (*name).to_owned()).chain(of_xen).collect()
}

fn install_debian(release: Release, mirror: &Mirror, root: &Path) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--mode=root", "--variant=minbase"])
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
        .arg(format!("--include={}", packages(release).join(",")))
        .arg(release.suite())
        .arg(root)
        .arg("-");
    output_with_input(&mut command, mirror.binary_lines().as_bytes())?;
    Ok(())
}

/// Unpacks the kernel without its package scripts (they would build an initramfs that nothing
/// uses); gives its release.
fn install_kernel(mirror: &Mirror, image: &Path, root: &Path) -> Result<String> {
    let package = mirror.first_dependency(KERNEL_PACKAGE)?;
    let release = package
        .strip_prefix("linux-image-")
        .with_context(|| format!("{package} is not named as a kernel"))?
        .to_owned();
    let unpacked = tempfile::tempdir_in(image)?;
    mirror.unpack_binary(&package, unpacked.path())?;
    let kernel = unpacked.path().join(format!("boot/vmlinuz-{release}"));
    fs::copy(&kernel, image.join(KERNEL))?;
    write(root, GUEST_KERNEL_PATH, 0o644, &fs::read(&kernel)?)?;
    fs::create_dir_all(root.join("lib/modules"))?;
    // Packages of a system whose /lib is /usr/lib have them there.
    let places = ["lib/modules", "usr/lib/modules"];
    let found = places.map(|place| unpacked.path().join(place).join(&release));
    let modules = found.iter().find(|place| place.exists()).context("A kernel without modules")?;
    fs::rename(modules, root.join("lib/modules").join(&release))?;
    output(Command::new("depmod").arg("-b").arg(root).arg(&release))?;
    Ok(release)
}

fn install_keys(keys: &Path, root: &Path) -> Result<()> {
    let public = |name: &str| fs::read(keys.join(name).with_extension("pub"));
    write(root, "/root/.ssh/id_ed25519", 0o600, &fs::read(keys.join(USER_KEY))?)?;
    write(root, "/root/.ssh/authorized_keys", 0o600, &public(USER_KEY)?)?;
    for kind in ["rsa", "ecdsa", "ed25519"] {
        for suffix in ["", ".pub"] {
            // The package made keys of its own; which kinds is not ours to know.
            let _ = fs::remove_file(root.join(format!("etc/ssh/ssh_host_{kind}_key{suffix}")));
        }
    }
    let host_key = format!("/etc/ssh/{HOST_KEY}");
    write(root, &host_key, 0o600, &fs::read(keys.join(HOST_KEY))?)?;
    write(root, &format!("{host_key}.pub"), 0o644, &public(HOST_KEY)?)?;
    write(root, "/etc/ssh/ssh_known_hosts", 0o644, &fs::read(keys.join(KNOWN_HOSTS))?)
}

fn configure(root: &Path) -> Result<()> {
    write(root, "/usr/local/sbin/rxl-lab-boot", 0o755, BOOT_SCRIPT.as_bytes())?;
    write(root, "/etc/inittab", 0o644, INITTAB.as_bytes())?;
    write(root, "/etc/ssh/sshd_config", 0o644, SSHD_CONFIG.as_bytes())?;
    write(root, "/etc/ssh/ssh_config", 0o644, SSH_CONFIG.as_bytes())?;
    write(root, "/etc/default/xen", 0o644, b"XENCONSOLED_ARGS=\"--log=all\"\n")?;
    symlink("/bin/busybox", root.join("sbin/init")).context("The root disk has an init")?;
    // On a migrated guest's host the log's name differs; nothing may depend on the folder's age.
    fs::create_dir_all(root.join("var/log/xen/console"))?;
    Ok(())
}

fn write(root: &Path, path: &str, permissions: u32, content: &[u8]) -> Result<()> {
    let target = root.join(path.trim_start_matches('/'));
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(&target, content)?;
    fs::set_permissions(&target, fs::Permissions::from_mode(permissions))?;
    Ok(())
}

fn write_initramfs(modules: &Path, target: &Path) -> Result<()> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "modules"] {
        archive.directory(dir);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?);
    archive.file("init", 0o755, INITRAMFS_INIT.as_bytes());
    let dependencies = parse_dependencies(&fs::read_to_string(modules.join("modules.dep"))?);
    let built_in = fs::read_to_string(modules.join("modules.builtin"))?;
    let built_in: Vec<&str> = built_in.lines().map(module_name).collect();
    let wanted: Vec<&str> =
        INITRAMFS_MODULES.iter().copied().filter(|name| !built_in.contains(name)).collect();
    let mut order = String::new();
    for path in load_order(&dependencies, &wanted)? {
        let name = module_name(&path);
        archive.file(&format!("modules/{name}"), 0o644, &module(&modules.join(&path))?);
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    fs::write(target, archive.finish())?;
    Ok(())
}

/// `modules.dep`: path of a module to the paths of those that it needs.
fn parse_dependencies(text: &str) -> BTreeMap<String, Vec<String>> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| {
            (path.to_owned(), needs.split_ascii_whitespace().map(str::to_owned).collect())
        })
        .collect()
}

/// Paths of the named modules and of all that they need, each after what it needs.
fn load_order(dependencies: &BTreeMap<String, Vec<String>>, names: &[&str]) -> Result<Vec<String>> {
    let mut order = Vec::new();
    for name in names {
        let Some((path, needs)) = dependencies.iter().find(|(path, _)| module_name(path) == *name)
        else {
            bail!("The kernel has no module {name}");
        };
        // modules.dep lists what a module needs in full, the deepest last.
        for path in needs.iter().rev().chain([path]) {
            if !order.contains(path) {
                order.push(path.clone());
            }
        }
    }
    Ok(order)
}

/// The name of a module, whether its file is compressed or not.
fn module_name(path: &str) -> &str {
    let file = path.rsplit_once('/').map_or(path, |(_, name)| name);
    file.split_once(".ko").map_or(file, |(name, _)| name)
}

/// What is in a module's file: busybox loads none that is compressed.
fn module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(path)?);
    }
    let unpacked = Command::new("xz").arg("-dc").arg(path).output().context("Cannot start xz")?;
    ensure!(unpacked.status.success(), "{} cannot be unpacked", path.display());
    Ok(unpacked.stdout)
}

fn xen_versions(dpkg_status: &str) -> String {
    let mut package = "";
    let mut versions = String::new();
    for line in dpkg_status.lines() {
        if let Some(name) = line.strip_prefix("Package: ") {
            package = name;
        } else if let Some(version) = line.strip_prefix("Version: ")
            && (package.starts_with("xen-utils-4") || package == "qemu-system-xen")
        {
            versions.push_str(&format!("{package} {version}\n"));
        }
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_load_order_shared_dependency_comes_once_and_first() {
        let text = "k/virtio.ko:\nk/ring.ko: k/virtio.ko\n\
                    k/pci.ko: k/ring.ko k/virtio.ko\nk/blk.ko.xz: k/ring.ko k/virtio.ko\n";
        let order = load_order(&parse_dependencies(text), &["pci", "blk"]).expect("all are there");
        assert_eq!(order, ["k/virtio.ko", "k/ring.ko", "k/pci.ko", "k/blk.ko.xz"]);
        assert_eq!(order.iter().map(|path| module_name(path)).next_back(), Some("blk"));
    }

    #[test]
    fn test_load_order_unknown_module_is_error() {
        assert!(load_order(&parse_dependencies("a/b.ko:\n"), &["c"]).is_err());
    }

    #[test]
    fn test_xen_versions_names_toolstack_only() {
        let status = "Package: bash\nVersion: 5\n\nPackage: xen-utils-4.17\nVersion: 4.17.5\n";
        assert_eq!(xen_versions(status), "xen-utils-4.17 4.17.5\n");
    }
}
