//! libFuzzer's program: runs the target that the environment variable `RXL_FUZZ_TARGET` names.
//! What it is told on its command line is libFuzzer's; `tests/run fuzz` starts it.
#![no_main]

use std::sync::LazyLock;

use rxl_fuzz::Target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("RXL_FUZZ_TARGET").expect("RXL_FUZZ_TARGET names a target");
    Target::named(&name).expect("RXL_FUZZ_TARGET names a target of rxl-fuzz")
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| TARGET.run(input));
