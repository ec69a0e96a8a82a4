//! The demonstration: two Xen hosts, a PV and a PVH guest that rewrite their memory, moved there
//! and back by rxl and then by the stock xl. Prints a table and, as its last line, the same as
//! JSON.

use anyhow::{Context, Result, bail};

use crate::guest::{Content, GuestKind, GuestSpec};
use crate::host::Host;
use crate::image::Images;
use crate::lab::{Lab, status};
use crate::migration::{Migration, Route};
use crate::state::Shape;
use crate::store::Store;

/// Pages that each guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 200;

const GUESTS: [(&str, GuestKind, u32); 2] =
    [("demo-pv", GuestKind::Pv, 128), ("demo-pvh", GuestKind::Pvh, 192)];

/// Runs it in the lab that is up, or in one of its own; gives the number of bad pages found.
///
/// # Errors
/// A migration fails, or a guest is not alive on exactly the host where it should be.
pub fn run(store: &Store) -> Result<u64> {
    let started_here = status(store)?.is_none();
    let lab = if started_here {
        Images::build(store, &Shape::default().all_releases())?;
        Lab::up(store, Shape::default())?
    } else {
        eprintln!("demo: uses the lab that is up, and leaves it up");
        Lab::attach(store)?
    };
    let moved = demonstrate(&lab);
    if started_here {
        Lab::down(store)?;
    }
    let migrations = moved?;
    print_table(&migrations);
    Ok(migrations.iter().map(|m| m.bad_pages).sum())
}

fn demonstrate(lab: &Lab) -> Result<Vec<Migration>> {
    lab.push_rxl()?;
    let [host1, host2, ..] = lab.hosts() else { bail!("The demo needs two hosts") };
    start_all(lab, [host1, host2])?;
    let moved = move_all(lab, host1, host2);
    // Whatever happened, what is left is looked at and taken away.
    for (name, _, _) in GUESTS {
        if moved.is_ok() || !lab.find_guest(name)?.is_empty() {
            lab.stop_guest(name)?;
        }
    }
    moved
}

/// Starts the guests at once, each on a host of its own: booting is the longest wait of all.
fn start_all(lab: &Lab, hosts: [&Host; 2]) -> Result<()> {
    std::thread::scope(|scope| {
        let start = |(host, (name, kind, memory_mib))| {
            let mut spec = GuestSpec::new(name, kind, memory_mib);
            spec.dirty_pages_per_s = DIRTY_PAGES_PER_S;
            spec.content = Content::Random;
            scope.spawn(move || lab.start_guest(host, &spec))
        };
        let started: Vec<_> = hosts.into_iter().zip(GUESTS).map(start).collect();
        started.into_iter().try_for_each(|thread| match thread.join() {
            Ok(started) => started,
            Err(_) => bail!("A guest could not be started"),
        })
    })
}

fn move_all(lab: &Lab, host1: &Host, host2: &Host) -> Result<Vec<Migration>> {
    let mut migrations = Vec::new();
    for route in [Route::Rxl, Route::Xl] {
        for (name, kind, _) in GUESTS {
            // There and back, from where it was started.
            let (here, there) = match kind {
                GuestKind::Pv => (host1, host2),
                _ => (host2, host1),
            };
            for (from, to) in [(here, there), (there, here)] {
                let migration = lab
                    .migrate(name, kind, from, to, route)
                    .with_context(|| format!("{route}: {name} to {}", to.name()))?;
                eprintln!(
                    "demo: {route} moved {name} to {} in {:.1} s, {} bad pages",
                    to.name(),
                    seconds(migration.total_ms),
                    migration.bad_pages
                );
                migrations.push(migration);
            }
        }
    }
    Ok(migrations)
}

/// The last line.
#[derive(serde::Serialize)]
struct Summary<'a> {
    migrations: &'a [Migration],
}

/// The table, and the JSON as the last line.
#[allow(clippy::print_stdout, reason = "this is what the program is for")]
fn print_table(migrations: &[Migration]) {
    println!(
        "\n{:<5} {:<14} {:<4} {:>9} {:>10} {:>12} {:>10} {:>9}",
        "kind", "direction", "who", "total s", "pause ms", "guest gap ms", "MiB sent", "bad pages"
    );
    for m in migrations {
        let pause = m.pause_ms.map_or_else(|| "null".to_owned(), |ms| ms.to_string());
        println!(
            "{:<5} {:<14} {:<4} {:>9.1} {:>10} {:>12} {:>10.1} {:>9}",
            m.kind,
            format!("{}->{}", m.from, m.to),
            m.by,
            seconds(m.total_ms),
            pause,
            m.guest_gap_ms,
            mib(m.bytes),
            m.bad_pages
        );
    }
    match serde_json::to_string(&Summary { migrations }) {
        Ok(json) => println!("\n{json}"),
        Err(error) => eprintln!("demo: {error}"),
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
