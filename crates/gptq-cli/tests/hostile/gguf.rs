//! GGUF files: counts, offsets, types, strings.

use crate::world;

fn find(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap() + text.len()
}

#[test]
fn malformed_counts_offsets_types_and_strings() {
    let world = world();
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    world.ok("convert q --to gguf -o whole.gguf -q");
    world.ok("generate whole.gguf --prompt a --max-new-tokens 2 -q");
    let whole = world.read("whole.gguf");
    let patched = |at: usize, patch: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    };
    let huge = u64::MAX.to_le_bytes();
    let many = (1_u64 << 40).to_le_bytes();
    let zero = 0_u64.to_le_bytes();
    let architecture = find(&whole, "general.architecture");
    let tokens = find(&whole, "tokenizer.ggml.tokens");
    let tensor = find(&whole, "blk.0.attn_q.weight");
    for (what, part, bytes) in [
        ("empty", "", Vec::new()),
        ("magic", "GGUF", patched(0, b"GGML")),
        ("version", "version 9", patched(4, &[9])),
        ("big endian", "big-endian", patched(4, &[0, 0, 0, 3])),
        ("tensor count", "tensors", patched(8, &huge)),
        ("key count", "keys", patched(16, &huge)),
        ("key count of 2^40", "keys", patched(16, &many)),
        ("length of a key", "key 0", patched(architecture - 28, &huge)),
        ("UTF-8 of a key", "UTF-8", patched(architecture - 20, &[0xff, 0xfe])),
        ("type of a value", "general.architecture", patched(architecture, &[77, 0, 0, 0])),
        ("length of a string", "general.architecture", patched(architecture + 4, &many)),
        ("UTF-8 of a string", "general.architecture", patched(architecture + 12, &[0xff])),
        ("type of an array", "tokenizer.ggml.tokens", patched(tokens + 4, &[77, 0, 0, 0])),
        ("count of an array", "tokenizer.ggml.tokens", patched(tokens + 8, &many)),
        ("length in an array", "tokenizer.ggml.tokens", patched(tokens + 16, &many)),
        ("number of dimensions", "blk.0.attn_q.weight", patched(tensor, &[99, 0, 0, 0])),
        ("dimension", "blk.0.attn_q.weight", patched(tensor + 4, &huge)),
        ("first dimension of 0", "blk.0.attn_q.weight", patched(tensor + 4, &zero)),
        ("second dimension of 0", "blk.0.attn_q.weight", patched(tensor + 12, &zero)),
        (
            "dimensions that overflow",
            "blk.0.attn_q.weight",
            patched(tensor + 4, &[&many[..], &many].concat()),
        ),
        ("type of a tensor", "type 200", patched(tensor + 20, &[200, 0, 0, 0])),
        ("offset", "blk.0.attn_q.weight", patched(tensor + 24, &huge)),
        ("offset not aligned", "blk.0.attn_q.weight", patched(tensor + 24, &[1])),
        ("offset of another tensor", "overlap", patched(tensor + 24, &zero)),
        ("half of the header", "truncated", whole[..tensor / 2].to_vec()),
        ("end of the data", "truncated", whole[..whole.len() - 64].to_vec()),
    ] {
        world.write("bad.gguf", bytes);
        for line in [
            "generate bad.gguf --prompt a -q",
            "quantize bad.gguf -o out --method rtn --group-size 32 -q",
        ] {
            let message = world.fails(line);
            let named = message.contains("bad.gguf") && message.contains(part);
            assert!(named, "{what}: gptq {line}: {message}");
        }
    }
}
