//! `lab-rsh`, a transport between the hosts without encryption.
//!
//! An emulated processor needs longer for ssh's ciphers than for all the rest of a migration, for
//! rxl and for xl alike. `-s lab-rsh` takes that out of a comparison. It is no more than a shell
//! for whoever can reach a host, and only the lab's own namespace can. The client is
//! `rxl-guest/src/bin/lab-rsh.rs`, the server `recipe/lab-rsh-server`.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::host::Host;

/// The client, in the place of ssh.
pub(crate) const CLIENT: &str = "lab-rsh";

const CLIENT_PATH: &str = "/usr/local/bin/lab-rsh";
const SERVER_PATH: &str = "/usr/local/lib/rxl-lab/lab-rsh-server";

/// Installs both ends on a host and starts the server.
pub(crate) fn install(host: &Host, client: &Path) -> Result<()> {
    host.write_file(CLIENT_PATH, "755", &fs::read(client)?)?;
    host.write_file(SERVER_PATH, "755", include_bytes!("../recipe/lab-rsh-server"))?;
    let serve = format!("setsid {SERVER_PATH} > /var/log/lab-rsh.log 2>&1 < /dev/null &");
    let wait = format!("until {CLIENT_PATH} localhost true 2> /dev/null; do sleep 0.1; done");
    host.run(&format!("{serve} {wait}"))?;
    Ok(())
}
