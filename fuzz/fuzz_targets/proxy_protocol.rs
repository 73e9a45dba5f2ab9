//! What must hold is said at `hopgate_proxy::fuzzing::proxy_protocol`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hopgate_proxy::fuzzing::proxy_protocol(bytes));
