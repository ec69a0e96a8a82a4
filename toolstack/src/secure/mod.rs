//! A migration's channel over TLS 1.3, without ssh: both ends show certificates from files.
//!
//! ```text
//!   rxl migrate ⇄ pipes ⇄ relay (a process, like ssh) ⇄ TLS ⇄ relay ⇄ pipes ⇄ rxl migrate-receive
//!                         client                              listener
//! ```
//!
//! [`credentials`] are the files; [`relay`] moves bytes between two pipes and an encrypted
//! connection; [`listener`] lets in who shows a certificate that it trusts.
//!
//! What it is not: it knows nothing of what goes through. Links have TLS of their own
//! ([`crate::tls`]).

pub mod credentials;
pub mod listener;
pub mod relay;

pub use credentials::Credentials;
pub use listener::Listener;

#[cfg(test)]
mod tests;
