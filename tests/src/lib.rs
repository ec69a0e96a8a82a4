//! What spans rxl's crates: programs of the distribution that judge its work ([`stock`]), and
//! the runner of everything ([`tally`], [`unit`]).
//!
//! Tests of one crate are in that crate. `tests/run help` says what can be run.
#![forbid(unsafe_code)]

pub mod stock;
pub mod tally;
pub mod unit;
