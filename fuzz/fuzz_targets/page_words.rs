//! What must hold is said at `cutover_agent::fuzzing::page_words`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cutover_agent::fuzzing::page_words(bytes));
