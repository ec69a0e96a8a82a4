//! Debian's own Xen programs, as judges: they run here without a Xen underneath.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Where Debian 12 keeps the programs and libraries of one release of Xen.
const XEN_DIR: &str = "/usr/lib/xen-4.17";

/// The path of a stock program, e.g. `libxl-save-helper`.
///
/// # Errors
/// It is not installed; the text says what to do.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = Path::new(XEN_DIR).join("bin").join(name);
    ensure!(
        path.is_file(),
        "{} is missing: install the package xen-utils-4.17 (tests/run does it)",
        path.display()
    );
    Ok(path)
}

/// Layers of a stream, by the name that `verify-stream-v2` has for the outermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A bare libxc stream.
    Libxc,
    /// The same in libxl's stream.
    Libxl,
    /// The same in a file as `xl save` writes it.
    Xl,
}

/// What stock's verifier says of a stream: its summary of headers and records.
///
/// # Errors
/// The verifier is not installed, or it refuses the stream; the text is its complaint.
pub fn verify_stream(stream: &[u8], format: Format) -> Result<String> {
    let verifier = program("verify-stream-v2")?;
    // From a file: the verifier takes a short read from a pipe for the end of the stream.
    let mut file = tempfile::NamedTempFile::new().context("Cannot make a file for the stream")?;
    file.write_all(stream).context("Cannot write the stream to a file")?;
    let output = Command::new(verifier)
        .env("PYTHONPATH", Path::new(XEN_DIR).join("lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .args(["--verbose", "--format"])
        .arg(match format {
            Format::Libxc => "libxc",
            Format::Libxl => "libxl",
            Format::Xl => "xl",
        })
        .arg("--in")
        .arg(file.path())
        .output()
        .context("Cannot start verify-stream-v2")?;
    if !output.status.success() {
        bail!("verify-stream-v2: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
