//! Malformed and malicious input through the real binary: one message that names the file and what is wrong, exit code 1, no
//! panic, nothing left behind, and all of it in 2 GiB of address space.

#![allow(missing_docs)]

mod calibration;
mod chat;
mod config;
mod files;
mod gguf;
mod quantized;
mod safetensors;
mod values;

use gptq_testkit::World;

/// Address space of every run, in KiB: room for threads and mapped files, none for what a file merely claims to hold.
const ADDRESS_SPACE: u32 = 2 << 20;

const QUANTIZE: &str =
    "quantize model -o out --calibration text.txt --nsamples 4 --seqlen 64 --group-size 32 -q";
const ROUND: &str = "quantize model -o out --method rtn --group-size 32 -q";
const EVAL: &str = "eval model --perplexity text.txt --seqlen 64 --max-windows 2 -q";
const GENERATE: &str = "generate model --prompt ab --max-new-tokens 4 -q";
const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

fn world() -> World {
    World::new(env!("CARGO_BIN_EXE_gptq")).limited(ADDRESS_SPACE)
}
