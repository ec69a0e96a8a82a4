//! Writer of initramfs archives (cpio, "newc" form), so that device nodes need no root and the
//! bytes depend on the content alone.

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;

impl Archive {
    /// A folder; parents must come first.
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, S_IFDIR | 0o755, (0, 0), &[]);
    }

    /// A regular file.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, S_IFREG | permissions, (0, 0), content);
    }

    /// A character device.
    pub(crate) fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, S_IFCHR | 0o600, (major, minor), &[]);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let is_folder = mode & S_IFDIR != 0;
        let fields = [
            self.entries, // inode number
            mode,
            0,                             // user
            0,                             // group
            if is_folder { 2 } else { 1 }, // links
            0,                             // modification time
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0, // device of the file itself
            0,
            device.0,
            device.1,
            u32::try_from(name.len()).unwrap_or(u32::MAX).saturating_add(1),
            0, // checksum, unused in this form
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_archive_file_has_header_name_and_padding() {
        let mut archive = Archive::default();
        archive.file("ab", 0o755, b"hello");
        let bytes = archive.finish();
        let header = "070701\
                      00000001000081ed000000000000000000000001\
                      00000000000000050000000000000000000000000000000000000003\
                      00000000";
        assert_eq!(bytes.get(..110), Some(header.as_bytes()));
        // Header and name are padded to 4 together, then the content by itself.
        assert_eq!(bytes.get(110..124), Some(b"ab\0\0\0\0hello\0\0\0".as_slice()));
        assert_eq!(bytes.len() % 4, 0);
    }
}
