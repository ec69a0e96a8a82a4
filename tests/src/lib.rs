//! What spans rxl's crates: programs of the distribution that judge its work ([`stock`]), the
//! suites that run in the lab ([`smoke`], [`interop`], [`soak`], [`bad_input`], [`failures`],
//! [`restless`], [`extents`], [`evacuate`], [`kmod`]) or on a modelled Xen ([`fake`]), benchmarks
//! in the lab ([`bench`]), what starts the simulator ([`sim`]), the search for inputs that break a
//! parser ([`fuzz`]), a look at pages with a browser ([`report`]), and the runner of everything
//! ([`tally`], [`unit`]).
//!
//! Tests of one crate are in that crate. `tests/run help` says what can be run.
#![forbid(unsafe_code)]

pub mod background;
pub mod bad_input;
pub mod bench;
pub mod census;
pub mod devices;
pub mod dkms;
pub mod drop_in;
pub mod evacuate;
pub mod extents;
pub mod failures;
pub mod fake;
pub mod fuzz;
pub mod interop;
pub mod kmod;
pub mod lab;
pub mod readme;
pub mod report;
pub mod restless;
pub mod sim;
pub mod smoke;
pub mod soak;
pub mod stock;
pub mod tally;
pub mod unit;
pub mod virsh;
