//! Which libxl to load: file names and folders.
//!
//! libxl's SONAME carries Xen's release (`libxenlight.so.4.17`), and a libxl works only on the
//! hypervisor of its own release. Where the kernel tells which one runs, only that one is looked
//! for; else (no Xen, or a kernel without `CONFIG_SYS_HYPERVISOR`) every release that is known to
//! have the functions and layouts used here (see [`super`]), newest first.

use std::fs;
use std::path::{Path, PathBuf};

/// A release of Xen: major, minor.
type Release = (u32, u32);

/// Minor numbers of Xen 4 whose `libxl.h`, `libxl_event.h` and types were compared.
const KNOWN_MINORS: std::ops::RangeInclusive<u32> = 14..=22;
/// What Linux says of the hypervisor under it.
const HYPERVISOR_VERSION: &str = "/sys/hypervisor/version";
/// Where libraries are, besides the dynamic linker's own folders. `{R}` is the release.
const FOLDERS: [&str; 7] = [
    "/usr/lib/xen-{R}/lib/x86_64-linux-gnu",
    "/usr/lib/xen-{R}/lib",
    "/usr/lib/xen-{R}/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/local/lib64",
    "/usr/local/lib",
];

/// The libraries to try, in this order.
pub(super) fn candidates() -> Vec<PathBuf> {
    candidates_for(running_release(Path::new(HYPERVISOR_VERSION)))
}

/// What to install, for the error text: the package's name holds the release on Debian.
pub(super) fn advice() -> String {
    let release = running_release(Path::new(HYPERVISOR_VERSION));
    let debian = release.map_or_else(
        || "xen-utils-4.x".to_owned(),
        |(major, minor)| format!("xen-utils-{major}.{minor}"),
    );
    format!(
        "install the tools of the Xen release that runs here \
         (Debian: {debian}; Fedora: xen-runtime; SUSE: xen-tools)"
    )
}

/// Bare names first: these go through the dynamic linker's configuration and `LD_LIBRARY_PATH`.
fn candidates_for(running: Option<Release>) -> Vec<PathBuf> {
    let releases = match running {
        Some(release) => vec![release],
        None => KNOWN_MINORS.rev().map(|minor| (4, minor)).collect(),
    };
    let mut all = Vec::new();
    for (major, minor) in releases {
        let release = format!("{major}.{minor}");
        let name = format!("libxenlight.so.{release}");
        all.push(PathBuf::from(&name));
        let folders = FOLDERS.iter().map(|f| PathBuf::from(f.replace("{R}", &release)));
        all.extend(folders.map(|folder| folder.join(&name)).filter(|file| file.exists()));
    }
    all
}

fn running_release(version: &Path) -> Option<Release> {
    let number = |file: &str| fs::read_to_string(version.join(file)).ok()?.trim().parse().ok();
    Some((number("major")?, number("minor")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_a_running_xen_only_its_own_release_is_tried() {
        let all = candidates_for(Some((4, 99)));
        assert_eq!(all, [PathBuf::from("libxenlight.so.4.99")]);
    }

    #[test]
    fn without_a_running_xen_every_known_release_is_tried_newest_first() {
        let all = candidates_for(None);
        let bare: Vec<_> = all.iter().filter(|p| p.components().count() == 1).collect();
        assert_eq!(bare.len(), 9);
        assert_eq!(bare[0], Path::new("libxenlight.so.4.22"));
        assert_eq!(bare[8], Path::new("libxenlight.so.4.14"));
    }

    #[test]
    fn a_library_outside_the_linkers_folders_is_found_where_it_exists() {
        let there = |p: &PathBuf| p.components().count() == 1 || p.exists();
        assert!(candidates_for(None).iter().all(there));
    }

    #[test]
    fn the_running_release_is_read_from_the_kernels_files() {
        let dir = std::env::temp_dir().join(format!("rxl-release-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(running_release(&dir), None);
        fs::write(dir.join("major"), "4\n").unwrap();
        fs::write(dir.join("minor"), "17\n").unwrap();
        assert_eq!(running_release(&dir), Some((4, 17)));
        fs::remove_dir_all(&dir).unwrap();
    }
}
