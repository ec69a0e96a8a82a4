//! `rxl divert`: has stock `xl` and libvirt use rxl's save helper, and, if wanted, scripts that
//! call `xl` use rxl; and the way back.
//!
//! A program of the distribution is put aside (`dpkg-divert`), and a link to rxl put in its place:
//! upgrades of Xen's packages then replace the one aside. At no moment is the place empty, and to
//! do either again changes nothing.
//!
//! What it is not: it chooses no helper for a single command; that is `LIBXL_SAVE_HELPER`. It
//! knows Debian's way only.

use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

use anyhow::{Context, ensure};

use crate::cli::DivertArgs;
use crate::{Exit, output, save_helper};

/// What is appended to the name of a program that is put aside: `dpkg-divert`'s own word.
const ASIDE: &str = ".distrib";
/// Where scripts find `xl`, from the root.
const XL: &str = "usr/sbin/xl";

/// Puts stock programs aside, or back, and says who is in each place.
pub(crate) fn run(args: &DivertArgs) -> anyhow::Result<Exit> {
    let own = env::current_exe().context("finding rxl itself")?;
    let system = System { root: PathBuf::from("/"), own };
    if args.undo {
        system.undo()?;
    } else if args.refresh {
        system.refresh()?;
    } else if !args.list {
        system.divert(args.as_xl)?;
    }
    for place in system.places() {
        let whose = if is_ours(&place) { "rxl" } else { "stock" };
        output::stdout(&format!("{}: {whose}\n", place.display()));
    }
    Ok(Exit::Success)
}

/// Where the program of `place` goes when it is put aside.
pub(crate) fn aside(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(ASIDE);
    PathBuf::from(name)
}

/// Where the tools of every installed Xen are: `usr/lib/xen-*/bin` under `root`.
pub(crate) fn xen_dirs(root: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(root.join("usr/lib"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("xen-"))
        .map(|entry| entry.path().join("bin"))
        .filter(|dir| dir.is_dir())
        .collect();
    found.sort();
    found
}

/// A system, and the rxl that is to be used there.
struct System {
    root: PathBuf,
    own: PathBuf,
}

impl System {
    /// Puts every Xen's save helper aside, and `xl` if wanted.
    fn divert(&self, as_xl: bool) -> anyhow::Result<()> {
        let helpers = self.helpers();
        ensure!(
            !helpers.is_empty(),
            "no {} in /usr/lib/xen-*/bin: install Xen's tools first (Debian: xen-utils-4.x)",
            save_helper::NAME
        );
        let xl = self.root.join(XL);
        ensure!(!as_xl || is_there(&xl), "there is no {} to take the place of", xl.display());
        helpers.iter().chain(as_xl.then_some(&xl)).try_for_each(|place| {
            self.take(place).with_context(|| format!("taking the place of {}", place.display()))
        })
    }

    /// What was chosen once, for a Xen that was installed since as well.
    fn refresh(&self) -> anyhow::Result<()> {
        if !self.helpers().iter().any(|place| is_ours(place)) {
            return Ok(());
        }
        self.divert(is_ours(&self.root.join(XL)))
    }

    /// Puts everything back.
    fn undo(&self) -> anyhow::Result<()> {
        self.places().iter().try_for_each(|place| {
            self.give_back(place).with_context(|| format!("putting {} back", place.display()))
        })
    }

    /// Every place that is or could be taken.
    fn places(&self) -> Vec<PathBuf> {
        let xl = self.root.join(XL);
        self.helpers().into_iter().chain(Some(xl).filter(|xl| is_there(xl))).collect()
    }

    fn helpers(&self) -> Vec<PathBuf> {
        let places = xen_dirs(&self.root).into_iter().map(|dir| dir.join(save_helper::NAME));
        places.filter(|place| is_there(place) || is_there(&aside(place))).collect()
    }

    fn take(&self, place: &Path) -> anyhow::Result<()> {
        if fs::read_link(place).is_ok_and(|target| target == self.own) {
            return Ok(());
        }
        let aside = aside(place);
        if !is_there(&aside) {
            fs::hard_link(place, &aside)?;
        }
        let to = self.seen(&aside);
        self.dpkg_divert(&["--divert".as_ref(), to.as_os_str(), "--add".as_ref()], place)?;
        // Beside it, and then over it.
        let mut draft = place.as_os_str().to_owned();
        draft.push(".rxl-new");
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        symlink(&self.own, &draft)?;
        Ok(fs::rename(&draft, place)?)
    }

    fn give_back(&self, place: &Path) -> anyhow::Result<()> {
        let aside = aside(place);
        match (is_ours(place), is_there(&aside)) {
            (true, true) => fs::rename(&aside, place)?,
            // The package is gone, and with it what was aside.
            (true, false) => fs::remove_file(place)?,
            // Somebody was stopped half way.
            (false, true) if is_same(place, &aside) => fs::remove_file(&aside)?,
            (false, _) => return Ok(()),
        }
        self.dpkg_divert(&["--remove".as_ref()], place)
    }

    /// Has dpkg note it. Files are moved here, not there.
    fn dpkg_divert(&self, args: &[&OsStr], place: &Path) -> anyhow::Result<()> {
        let mut command = Command::new("dpkg-divert");
        command.arg("--root").arg(&self.root).args(["--quiet", "--local", "--no-rename"]);
        let output = command.args(args).arg(self.seen(place)).output();
        let output = output.context("running dpkg-divert, without which nothing is diverted")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "dpkg-divert: {}", said.trim());
        Ok(())
    }

    /// A path as the system itself sees it.
    fn seen(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).map_or_else(|_| path.to_owned(), |p| Path::new("/").join(p))
    }
}

/// Whether rxl is in that place, of whichever path.
fn is_ours(place: &Path) -> bool {
    fs::read_link(place).is_ok_and(|target| target.file_name() == Some("rxl".as_ref()))
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn is_same(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| path.symlink_metadata().map(|m| (m.dev(), m.ino())).ok();
    id(a).is_some() && id(a) == id(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system with two Xens, and what is where in it.
    struct Fake {
        dir: tempfile::TempDir,
        system: System,
    }

    const HELPERS: [&str; 2] = ["4.17", "4.20"];

    impl Fake {
        fn new() -> Fake {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().to_owned();
            fs::create_dir_all(root.join("var/lib/dpkg")).unwrap();
            fs::create_dir_all(root.join("usr/sbin")).unwrap();
            for version in HELPERS {
                fs::create_dir_all(place(&root, version).parent().unwrap()).unwrap();
                fs::write(place(&root, version), format!("stock {version}")).unwrap();
            }
            fs::write(root.join(XL), "stock xl").unwrap();
            Fake { dir, system: System { root, own: PathBuf::from("/usr/bin/rxl") } }
        }

        /// Every file and link with its content, and what dpkg knows.
        fn all(&self) -> String {
            let mut lines = Vec::new();
            let mut left = vec![self.dir.path().to_owned()];
            while let Some(dir) = left.pop() {
                for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
                    let name = self.system.seen(&path).display().to_string();
                    match fs::read_link(&path) {
                        Ok(target) => lines.push(format!("{name} -> {}", target.display())),
                        Err(_) if path.is_dir() => left.push(path),
                        Err(_) if name.ends_with("-old") => {}
                        Err(_) => {
                            let content = fs::read_to_string(&path).unwrap().replace('\n', " ");
                            lines.push(format!("{name}: {}", content.trim()));
                        }
                    }
                }
            }
            lines.sort();
            lines.join("\n")
        }
    }

    fn place(root: &Path, version: &str) -> PathBuf {
        root.join(format!("usr/lib/xen-{version}/bin/libxl-save-helper"))
    }

    fn without_dpkg() -> bool {
        let is_missing = Command::new("dpkg-divert").arg("--version").output().is_err();
        if is_missing {
            eprintln!("not tested: there is no dpkg-divert");
        }
        is_missing
    }

    const DIVERTED: &str = "\
/usr/lib/xen-4.17/bin/libxl-save-helper -> /usr/bin/rxl
/usr/lib/xen-4.17/bin/libxl-save-helper.distrib: stock 4.17
/usr/lib/xen-4.20/bin/libxl-save-helper -> /usr/bin/rxl
/usr/lib/xen-4.20/bin/libxl-save-helper.distrib: stock 4.20
/usr/sbin/xl -> /usr/bin/rxl
/usr/sbin/xl.distrib: stock xl";

    #[test]
    fn what_is_diverted_once_or_twice_comes_back_as_it_was() {
        if without_dpkg() {
            return;
        }
        let fake = Fake::new();
        let before = fake.all();
        for _ in 0..2 {
            fake.system.divert(true).unwrap();
            let all = fake.all();
            let (files, dpkg) = all.split_once("\n/var/").unwrap();
            assert_eq!(files, DIVERTED);
            assert_eq!(dpkg.matches(".distrib").count(), 3, "{dpkg}");
        }
        for _ in 0..2 {
            fake.system.undo().unwrap();
            assert_eq!(fake.all().replace("\n/var/lib/dpkg/diversions:", "").trim(), before);
        }
    }

    #[test]
    fn an_upgrade_and_another_xen_keep_what_was_chosen() {
        if without_dpkg() {
            return;
        }
        let fake = Fake::new();
        let root = fake.system.root.clone();
        fs::remove_dir_all(root.join("usr/lib/xen-4.20")).unwrap();
        // Nothing was chosen yet.
        fake.system.refresh().unwrap();
        assert!(!is_ours(&place(&root, "4.17")));
        fake.system.divert(false).unwrap();
        // As dpkg does it for a file that is diverted.
        fs::write(aside(&place(&root, "4.17")), "newer 4.17").unwrap();
        fs::create_dir_all(root.join("usr/lib/xen-4.20/bin")).unwrap();
        fs::write(place(&root, "4.20"), "stock 4.20").unwrap();
        fake.system.refresh().unwrap();
        assert!(is_ours(&place(&root, "4.17")) && is_ours(&place(&root, "4.20")));
        assert!(!is_ours(&root.join(XL)));
        fake.system.undo().unwrap();
        assert_eq!(fs::read_to_string(place(&root, "4.17")).unwrap(), "newer 4.17");
    }

    #[test]
    fn half_a_diversion_and_a_xen_that_is_gone_are_cleared_away() {
        if without_dpkg() {
            return;
        }
        let fake = Fake::new();
        let (one, other) = (place(&fake.system.root, "4.17"), place(&fake.system.root, "4.20"));
        fake.system.divert(false).unwrap();
        fs::remove_file(aside(&one)).unwrap();
        fs::rename(aside(&other), &other).unwrap();
        fs::hard_link(&other, aside(&other)).unwrap();
        fake.system.undo().unwrap();
        assert!(!is_there(&one) && !is_there(&aside(&other)));
        assert_eq!(fs::read_to_string(other).unwrap(), "stock 4.20");
    }
}
