//! State records of an HVM or PVH guest.

use crate::error::Result;
use crate::hypervisor::SourceDomain;
use crate::stream::libxc::{self, RecordKind};
use crate::x86::hvm;

/// HVM context and parameters, as records in stock's order.
///
/// # Errors
/// The hypercalls'.
pub(super) fn state_records<D: SourceDomain>(domain: &D) -> Result<Vec<Vec<u8>>> {
    let context = domain.hvm_context()?;
    let mut params = Vec::with_capacity(hvm::SENT.len());
    for index in hvm::SENT {
        let value = domain.hvm_param(index)?;
        if value != 0 {
            params.push((u64::from(index), value));
        }
    }
    let mut records = vec![libxc::record(RecordKind::HvmContext, &[&context])?];
    if !params.is_empty() {
        records.push(libxc::record(RecordKind::HvmParams, &[&libxc::hvm_params(&params)])?);
    }
    Ok(records)
}
