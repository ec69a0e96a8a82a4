//! Migrations in which something is lost, on Xen hosts: processes and connections at chosen points
//! of a migration ([`kills`]), and workers, links and network cards while memory goes over four of
//! these ([`losses`]). Never may two copies of a guest run, or none that could be had back.

mod aftermath;
mod by_hand;
mod kills;
mod losses;
mod points;

use clap::Args;
use rxl_lab::{GuestKind, GuestSpec};

use crate::failures::kills::Kills;
use crate::lab::{Session, spec};
use crate::tally::{Tally, note};

/// Pages that a guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 200;

/// What is asked for.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Only those whose name contains PATTERN; may be repeated
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Print the names
    #[arg(long)]
    list: bool,
}

impl Options {
    fn has(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| name.contains(pattern))
    }
}

/// Runs what is asked for, in a lab of its own if none is up.
pub fn run(tally: &mut Tally, options: &Options) {
    let kills: Vec<_> = points::all().into_iter().filter(|p| options.has(&p.name())).collect();
    let losses: Vec<_> = losses::all().into_iter().filter(|l| options.has(&l.name())).collect();
    if options.list {
        kills.iter().map(points::Point::name).for_each(note);
        losses.iter().map(losses::Loss::name).for_each(note);
        // Listing is no failure.
        tally.add("list", 1, 0);
        return;
    }
    let Some(session) = tally.case("the lab is up, with rxl on it", losses::open) else { return };
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let label = kind.to_string().to_uppercase();
        let kills: Vec<_> = kills.iter().filter(|point| point.kind == kind).collect();
        let losses: Vec<_> = losses.iter().filter(|loss| loss.kind == kind).collect();
        if kills.is_empty() && losses.is_empty() {
            continue;
        }
        let spec = guest(kind);
        tally.case(&format!("{label}: start"), || session.start_spec(&spec));
        if !kills.is_empty() {
            Kills::new(&session, &spec).run(tally, &kills);
        }
        losses::run(tally, &session, &spec, &losses);
        tally.case(&format!("{label}: stop"), || session.remove(&spec.name));
    }
}

/// The guest of a kind that is moved.
fn guest(kind: GuestKind) -> GuestSpec {
    let dirty_pages_per_s = DIRTY_PAGES_PER_S;
    GuestSpec { dirty_pages_per_s, ..spec(&format!("lost-{kind}"), kind) }
}

/// Gives the next case a guest, if this one has lost it.
fn start_again(tally: &mut Tally, session: &Session, spec: &GuestSpec) {
    let name = format!("{}: start again", spec.kind.to_string().to_uppercase());
    tally.case(&name, || session.start_spec(spec));
}
