//! A configuration from a file in xl.cfg's syntax, which the real `xl` reads for us.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use rxl_migrate::xl::config::DomainConfig;
use serde_json::Value;

/// What makes a guest that guest; a file's value must not replace it.
const IDENTITY: [&str; 2] = ["name", "uuid"];

/// The configuration in `file`, for the guest whose configuration is `running`.
pub(crate) fn for_guest(
    xl: &Path,
    file: &str,
    running: &DomainConfig,
) -> anyhow::Result<DomainConfig> {
    let parse = |config: &DomainConfig| serde_json::from_str::<Value>(&config.to_json());
    let (mut config, running) = (parse(&from_file(xl, file)?)?, parse(running)?);
    if let Some(Value::Object(c_info)) = config.get_mut("c_info") {
        for key in IDENTITY {
            match running.get("c_info").and_then(|c| c.get(key)) {
                Some(value) => c_info.insert(key.to_owned(), value.clone()),
                None => c_info.remove(key),
            };
        }
    }
    Ok(DomainConfig::parse(&config.to_string())?)
}

/// The configuration in `file`, with the name and the UUID that it says (or `xl` makes up).
pub(crate) fn from_file(xl: &Path, file: &str) -> anyhow::Result<DomainConfig> {
    let output = Command::new(xl)
        .args(["create", "-q", "-n", file])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {}", xl.display()))?;
    if !output.status.success() {
        bail!("{} cannot use the configuration file {file}", xl.display());
    }
    let json = String::from_utf8_lossy(&output.stdout);
    DomainConfig::parse(&json).with_context(|| format!("reading what xl makes of {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_read_by_the_real_xl_and_the_guest_stays_itself() {
        let dir = tempfile::tempdir().unwrap();
        let xl = dir.path().join("xl");
        let script = "#!/bin/sh\n[ \"$*\" = 'create -q -n g.cfg' ] || exit 1\n\
                      echo '{\"c_info\":{\"name\":\"b\",\"uuid\":\"new\",\"type\":\"pv\"}}'\n";
        std::fs::write(&xl, script).unwrap();
        std::fs::set_permissions(&xl, std::fs::Permissions::from_mode(0o755)).unwrap();
        let running = r#"{"c_info":{"name":"a","uuid":"u-1","type":"pvh"}}"#;
        let running = DomainConfig::parse(running).unwrap();
        let config = for_guest(&xl, "g.cfg", &running).unwrap();
        assert_eq!(config.to_json(), r#"{"c_info":{"name":"a","type":"pv","uuid":"u-1"}}"#);
        assert_eq!(from_file(&xl, "g.cfg").unwrap().name(), Some("b"));
        assert!(from_file(&xl, "other").is_err());
    }
}
