#![no_main]

#[allow(dead_code)] // One of the readers is fuzzed here.
#[path = "../../crates/gptq-model/tests/readers/mod.rs"]
mod readers;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = readers::config(data);
});
