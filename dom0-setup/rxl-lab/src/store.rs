//! Where the lab keeps things: the cache of built images, keyed by a hash of what they are built
//! from, and the state of the one running lab.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::progress::step;

/// The lab's folder in the user's cache: `images/` and `state/`.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// `${XDG_CACHE_HOME:-$HOME/.cache}/rxl-lab`.
    pub fn open() -> Result<Self> {
        let cache = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
            Some(dir) => PathBuf::from(dir),
            None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
        };
        let root = cache.join("rxl-lab");
        fs::create_dir_all(root.join("images"))
            .with_context(|| format!("Cannot create {}", root.display()))?;
        Ok(Self { root })
    }

    /// Folder with everything about the running lab.
    pub fn state_dir(&self) -> PathBuf {
        self.root.join("state")
    }

    /// The lock file; outside the state folder, which comes and goes.
    pub fn lock_file(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Folder of an image if it has been built.
    pub fn find(&self, kind: &str, key: &ImageKey) -> Option<PathBuf> {
        let dir = self.image_dir(kind, key);
        dir.is_dir().then_some(dir)
    }

    /// Folder of an image, built by `build` in a temporary folder first if it is not there yet.
    pub fn find_or_build(
        &self,
        kind: &str,
        key: &ImageKey,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(dir) = self.find(kind, key) {
            return Ok(dir);
        }
        let dir = self.image_dir(kind, key);
        step(&format!("built {kind} image"), || {
            let scratch = tempfile::Builder::new()
                .prefix(&format!("tmp-{kind}-"))
                .tempdir_in(self.root.join("images"))?;
            let image = scratch.path().join("image");
            fs::create_dir(&image)?;
            build(&image)?;
            // Only a finished image ever has the final name.
            fs::rename(&image, &dir)?;
            Ok(())
        })
        .with_context(|| format!("Cannot build the {kind} image"))?;
        Ok(dir)
    }

    fn image_dir(&self, kind: &str, key: &ImageKey) -> PathBuf {
        self.root.join("images").join(format!("{kind}-{}", key.0))
    }
}

/// Hash of everything an image is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageKey(String);

impl ImageKey {
    /// The key over `parts`; their order and borders count.
    pub fn over<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_image_key_moved_border_differs() {
        let one = ImageKey::over([b"ab".as_slice(), b"c"]);
        let other = ImageKey::over([b"a".as_slice(), b"bc"]);
        assert_ne!(one, other);
        assert_eq!(one.as_str().len(), 16);
    }

    #[test]
    fn test_image_key_same_parts_same_key() {
        assert_eq!(ImageKey::over([b"x".as_slice()]), ImageKey::over([b"x".as_slice()]));
    }
}
