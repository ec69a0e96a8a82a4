//! This host's Xen behind the engine's traits.
//!
//! [`xc`] implements `rxl_migrate::hypervisor` with the stable Xen libraries; [`libxl`] implements
//! [`lifecycle`] with the host's libxl, loaded at run time; [`save_helper`] is what libxl runs to
//! move a stream. The only `unsafe` outside `xen-sys` is in `xc` and `libxl`, in named modules.
#![deny(unsafe_code)]

pub mod lifecycle;
