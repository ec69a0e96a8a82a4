//! Builds the module's range lock against the headers in `shim`, which take the kernel's place.

fn main() {
    let kmod = "../../dom0-setup/kmod";
    println!("cargo::rerun-if-changed={kmod}/range_lock.c");
    println!("cargo::rerun-if-changed={kmod}/range_lock.h");
    println!("cargo::rerun-if-changed=shim");
    cc::Build::new()
        .files([format!("{kmod}/range_lock.c"), "shim/glue.c".to_owned()])
        .includes(["shim", kmod])
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .compile("range_lock");
}
