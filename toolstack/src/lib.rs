//! This host's Xen behind the engine's traits.
//!
//! [`xc`] implements `rxl_migrate::hypervisor` with the stable Xen libraries; [`libxl`] implements
//! [`lifecycle`] with the host's libxl, loaded at run time. The save helper, which libxl runs to
//! move a stream, is `rxl`; [`abort`] is how it is stopped, [`inherit`] how it is handed more
//! than libxl's arguments. [`senders`] and [`receivers`] are the workers that it starts itself at
//! either end ([`worker`]), [`doorman`] is where connections between them come in, [`tls`] encrypts
//! them; [`secure`] is a channel between the two ends without ssh. The only `unsafe`
//! outside `xen-sys` is in `xc`, `libxl`, `abort` and `inherit`, in modules that allow it by name
//! and say why.
#![deny(unsafe_code)]

pub mod abort;
pub mod doorman;
pub mod inherit;
pub mod libxl;
pub mod lifecycle;
mod messages;
pub mod rate;
pub mod receivers;
pub mod secure;
pub mod senders;
pub mod tls;
pub mod worker;
pub mod xc;
