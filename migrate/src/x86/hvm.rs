//! HVM and PVH guests: the parameters that travel in the stream.
//!
//! Numbers are those of `xen/include/public/hvm/params.h`.

/// `HVM_PARAM_STORE_PFN`: xenstore's ring.
pub const STORE_PFN: u32 = 1;
/// `HVM_PARAM_STORE_EVTCHN`.
pub const STORE_EVTCHN: u32 = 2;
/// `HVM_PARAM_PAE_ENABLED`: old senders write it, nobody sets it any more.
pub const PAE_ENABLED: u32 = 4;
/// `HVM_PARAM_IOREQ_PFN`.
pub const IOREQ_PFN: u32 = 5;
/// `HVM_PARAM_BUFIOREQ_PFN`.
pub const BUFIOREQ_PFN: u32 = 6;
/// `HVM_PARAM_CONSOLE_PFN`: the console's ring.
pub const CONSOLE_PFN: u32 = 17;
/// `HVM_PARAM_CONSOLE_EVTCHN`.
pub const CONSOLE_EVTCHN: u32 = 18;

/// Parameters that a sender puts in the stream, in stock's order; zero values are left out.
pub const SENT: [u32; 16] = [
    STORE_PFN,
    IOREQ_PFN,
    BUFIOREQ_PFN,
    27, // PAGING_RING_PFN
    28, // MONITOR_RING_PFN
    29, // SHARING_RING_PFN
    37, // VM86_TSS_SIZED
    CONSOLE_PFN,
    19, // ACPI_IOPORTS_LOCATION
    9,  // VIRIDIAN
    12, // IDENT_PT
    34, // VM_GENERATION_ID_ADDR
    32, // IOREQ_SERVER_PFN
    33, // NR_IOREQ_SERVER_PAGES
    36, // X87_FIP_WIDTH
    38, // MCA_CAP
];
