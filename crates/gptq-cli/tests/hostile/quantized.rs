//! Packed tensors and settings of quantized checkpoints that contradict each other.

use serde_json::{Value, json};

use crate::{EVAL, GENERATE, world};

#[test]
fn quantized_modules_that_contradict_their_settings() {
    let world = world();
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    let whole = ["config.json", "quantize_config.json", "model.safetensors"]
        .map(|name| format!("q/{name}"));
    let whole = whole.map(|name| (world.read(&name), name));
    let restore = || whole.iter().for_each(|(bytes, name)| world.write(name, bytes));
    let [eval, generate] = [EVAL, GENERATE].map(|line| line.replacen("model", "q", 1));
    for (key, value) in [
        ("bits", json!(8)),
        ("bits", json!(3)),
        ("bits", json!(5)),
        ("bits", json!(u64::MAX)),
        ("group_size", json!(0)),
        ("group_size", json!(-7)),
        ("group_size", json!(16)),
        ("group_size", json!(i64::MAX)),
        ("checkpoint_format", json!("marlin")),
        ("quant_method", json!("awq")),
    ] {
        world.edit("q/config.json", |map| map["quantization_config"][key] = value.clone());
        world.edit("q/quantize_config.json", |map| drop(map.insert(key.to_owned(), value)));
        for line in [&eval, &generate] {
            world.refuses(line, &["q"]);
        }
        restore();
    }
    let module = "model.layers.0.self_attn.q_proj";
    for part in ["qweight", "qzeros", "scales", "g_idx"] {
        world.edit_header("q/model.safetensors", |header| {
            let shape = &mut header[&format!("{module}.{part}")]["shape"];
            let count: u64 = shape.as_array().unwrap().iter().filter_map(Value::as_u64).product();
            *shape = json!([1, 1, count]);
        });
        world.refuses(&eval, &["q", module, part]);
        restore();
    }
}

#[test]
fn group_indices_outside_of_the_groups() {
    let world = world();
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    let mut bytes = world.read("q/model.safetensors");
    let module = "model.layers.1.mlp.up_proj";
    let range = gptq_testkit::safetensors_file::range(&bytes, &format!("{module}.g_idx"));
    for index in [2_i32, i32::MAX, -1] {
        bytes[range.start..range.start + 4].copy_from_slice(&index.to_le_bytes());
        world.write("q/model.safetensors", &bytes);
        world.refuses(&EVAL.replacen("model", "q", 1), &["q", module, "g_idx"]);
        assert_eq!(world.gptq("verify q").status.code(), Some(1));
    }
}
