//! What must hold is said at `hopgate_proxy::fuzzing::forwarded`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hopgate_proxy::fuzzing::forwarded(bytes));
