//! A library to be preloaded (`LD_PRELOAD`) into a program of Xen's toolstack, where it takes the
//! place of libxencall, libxenforeignmemory and the opening of libxendevicemodel. All that the
//! program asks of Xen goes to the machine of `rxl-fake-xen` that [`wire::SOCKET_VARIABLE`] names;
//! guest memory is the machine's own, mapped.
//!
//! It knows no hypercall: it hands numbers on. The machine reads and writes the program's buffers
//! itself, as Xen does. What no save helper uses is left out: a program that asks for more gets
//! the real library's answer, which is that there is no Xen.
//!
//! Functions have the names and meanings of `xencall.h`, `xenforeignmemory.h` and
//! `xendevicemodel.h`. Their callers are C: an error is a null pointer or -1, and `errno`.
//!
//! # Safety
//! Pointers come from callers who keep to those headers. Handles are never looked into: any
//! pointer that is not null is one. Mappings are made where the kernel reserved room for them,
//! and only ever replaced or removed whole.
#![allow(
    clippy::missing_safety_doc,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the C headers document the functions, and fix the types of numbers"
)]

mod calls;
mod connection;
mod foreign;
#[path = "../../fake-xen/src/wire.rs"]
mod wire;
