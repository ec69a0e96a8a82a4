//! The file that a domain is saved to.
//!
//! It is written under another name in the same directory and gets its own once it is complete
//! and on the disk, so that a full disk, a crash or a cancellation leaves the file that was there
//! before. What is no file (a pipe, a device) is written to as it is, as `xl` does.
//!
//! What has the name already is replaced only where that cannot lose another guest: if it is a
//! saved domain of the same guest (the same UUID), or empty.

use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::header::{Header, HeaderError};
use tempfile::TempPath;

use crate::words;

/// Permissions of a new file before the umask, as `xl`'s.
const PERMISSIONS: u32 = 0o644;

/// Where a domain is written to.
#[derive(Debug)]
pub(crate) struct SaveFile {
    file: File,
    /// The name until it is complete, and that from then on.
    names: Option<(TempPath, PathBuf)>,
}

impl SaveFile {
    /// What is open already: standard output.
    pub(crate) fn of(open: OwnedFd) -> SaveFile {
        SaveFile { file: open.into(), names: None }
    }

    /// Begins a file that is to have the name `path`. `guest` is the configuration of what will be
    /// in it; with `force` whatever has that name is replaced.
    ///
    /// # Errors
    /// The directory's, and a file that is not to be replaced.
    pub(crate) fn begin(
        path: &Path,
        guest: &DomainConfig,
        force: bool,
    ) -> anyhow::Result<SaveFile> {
        let show = path.display();
        let old = match fs::metadata(path) {
            Ok(old) => Some(old),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("looking at {show}")),
        };
        match &old {
            Some(old) if old.is_dir() => bail!("{show} is a directory"),
            Some(old) if !old.is_file() => {
                let file = File::options().write(true).open(path);
                let file = file.with_context(|| cannot_write(path))?;
                return Ok(SaveFile { file, names: None });
            }
            Some(old) if !force => check_may_replace(path, old, guest)?,
            _ => {}
        }
        // A link stays one.
        let path = if old.is_some() { fs::canonicalize(path)? } else { path.to_owned() };
        let draft = begin_draft(&path).with_context(|| cannot_write(&path))?;
        let (file, draft) = draft.into_parts();
        if let Some(old) = old {
            file.set_permissions(old.permissions()).with_context(|| format!("making {show}"))?;
        }
        Ok(SaveFile { file, names: Some((draft, path)) })
    }

    /// A descriptor to write to.
    pub(crate) fn writer(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The name until it is complete; a file that has none needs no one to remove it.
    pub(crate) fn draft(&self) -> Option<&Path> {
        self.names.as_ref().map(|(draft, _)| draft.as_ref())
    }

    /// Brings all that was written to the disk, where there is one.
    pub(crate) fn sync(&self) -> io::Result<()> {
        match self.file.sync_all() {
            // A pipe, a socket, a character device.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }

    /// Gives it its name, on the disk too. After an error nothing of it has that name.
    pub(crate) fn publish(&mut self) -> io::Result<()> {
        let Some((draft, path)) = self.names.take() else { return Ok(()) };
        draft.persist(&path)?;
        let synced = File::open(directory(&path)).and_then(|directory| directory.sync_all());
        synced.inspect_err(|_| {
            // What a crash may take away must not be relied on.
            let _ = fs::remove_file(&path);
        })
    }
}

fn cannot_write(path: &Path) -> String {
    words::fill(words::CANNOT_WRITE, &[&path.display()])
}

fn begin_draft(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut prefix = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
    prefix.push(".");
    tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".partial")
        .permissions(Permissions::from_mode(PERMISSIONS))
        .tempfile_in(directory(path))
}

/// The directory of a file; a bare name is in the current one.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Nobody else's guest is in `path`, nor anything that is no guest.
fn check_may_replace(path: &Path, old: &Metadata, guest: &DomainConfig) -> anyhow::Result<()> {
    if old.len() == 0 {
        return Ok(());
    }
    let show = path.display();
    let mut file = File::open(path).with_context(|| format!("opening {show}"))?;
    let saved = match Header::read_from(&mut file) {
        Ok(header) => DomainConfig::parse(&header.config).ok(),
        Err(HeaderError::Read(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
            return Err(error).with_context(|| format!("reading {show}"));
        }
        Err(_) => None,
    };
    let Some(saved) = saved else {
        bail!("{show} is there already and is no saved domain; --force replaces it");
    };
    ensure!(
        saved.is_of_same_guest(guest),
        "{show} holds another guest ({}); --force replaces it",
        saved.name().unwrap_or("without a name")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    fn config(name: &str, uuid: &str) -> DomainConfig {
        let json = format!(r#"{{"c_info":{{"name":"{name}","uuid":"{uuid}"}}}}"#);
        DomainConfig::parse(&json).unwrap()
    }

    /// A file with that guest in it.
    fn saved(guest: &DomainConfig) -> Vec<u8> {
        Header::new(&guest.to_json()).unwrap().to_bytes()
    }

    fn write(file: &SaveFile, bytes: &[u8]) {
        File::from(file.writer().unwrap()).write_all(bytes).unwrap();
    }

    fn names_in(dir: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        fs::read_dir(dir).unwrap().map(|e| name(e).into_string().unwrap()).collect()
    }

    #[test]
    fn the_old_file_is_there_until_the_new_one_is_complete_and_nothing_else_remains() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.save");
        let web = config("web", "u1");
        fs::write(&path, saved(&web)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let mut file = SaveFile::begin(&path, &web, false).unwrap();
        write(&file, b"new");
        file.sync().unwrap();
        assert_eq!(fs::read(&path).unwrap(), saved(&web));
        assert!(file.draft().is_some_and(Path::exists));
        file.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names_in(dir.path()), ["web.save"]);
    }

    #[test]
    fn a_file_that_is_given_up_leaves_the_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.save");
        let file = SaveFile::begin(&path, &config("web", "u1"), false).unwrap();
        write(&file, b"half");
        drop(file);
        assert_eq!(names_in(dir.path()), [] as [&str; 0]);
    }

    #[test]
    fn another_guests_file_and_one_that_is_no_guest_are_replaced_only_by_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let web = config("web", "u1");
        let begin =
            |force| SaveFile::begin(&path, &web, force).map(drop).map_err(|e| e.to_string());
        fs::write(&path, saved(&config("db", "u2"))).unwrap();
        let text = begin(false).unwrap_err();
        assert!(text.ends_with("/x holds another guest (db); --force replaces it"), "{text}");
        begin(true).unwrap();
        for other in [b"a letter".as_slice(), &[0; 100], &saved(&web)[..60]] {
            fs::write(&path, other).unwrap();
            let text = begin(false).unwrap_err();
            assert!(text.contains("is no saved domain; --force replaces it"), "{text}");
        }
        fs::write(&path, b"").unwrap();
        begin(false).unwrap();
        fs::write(&path, saved(&config("renamed", "U1"))).unwrap();
        begin(false).unwrap();
    }

    #[test]
    fn a_link_stays_one_and_a_bare_name_is_in_the_current_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (link, path) = (dir.path().join("link"), dir.path().join("real"));
        fs::write(&path, b"").unwrap();
        symlink("real", &link).unwrap();
        let mut file = SaveFile::begin(&link, &config("web", "u1"), false).unwrap();
        write(&file, b"new");
        file.publish().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(directory(Path::new("web.save")), Path::new("."));
        assert_eq!(directory(Path::new("/web.save")), Path::new("/"));
    }

    #[test]
    fn what_is_no_file_is_written_to_and_never_replaced() {
        let guest = config("web", "u1");
        let mut file = SaveFile::begin(Path::new("/dev/full"), &guest, false).unwrap();
        assert_eq!(file.draft(), None);
        let error = File::from(file.writer().unwrap()).write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        file.sync().unwrap();
        file.publish().unwrap();
        let text = SaveFile::begin(Path::new("/"), &guest, true).unwrap_err().to_string();
        assert_eq!(text, "/ is a directory");
        let error = SaveFile::begin(Path::new("/nonexistent/x"), &guest, true).unwrap_err();
        assert_eq!(error.to_string(), "Failed to open temp file /nonexistent/x for writing");
    }
}
