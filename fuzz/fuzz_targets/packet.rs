//! What must hold is said at `hopgate_proxy::fuzzing::packet`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hopgate_proxy::fuzzing::packet(bytes));
