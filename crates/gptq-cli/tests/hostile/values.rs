//! Weights and activations that are not numbers, and ids that are no tokens.

use gptq_testkit::{World, safetensors_file};
use serde_json::json;

use crate::{EVAL, GENERATE, Q_PROJ, QUANTIZE, ROUND, world};

const NAME: &str = "model/model.safetensors";

#[test]
fn weights_that_are_nan_or_infinite() {
    let world = world();
    for (tensor, value) in [
        (Q_PROJ, f32::NAN),
        (Q_PROJ, f32::INFINITY),
        ("model.layers.1.mlp.down_proj.weight", f32::NAN),
        ("model.embed_tokens.weight", f32::NAN),
        ("model.layers.0.input_layernorm.weight", f32::NEG_INFINITY),
        ("model.norm.weight", f32::NAN),
        ("lm_head.weight", f32::NAN),
        ("lm_head.weight", f32::INFINITY),
    ] {
        world.fill(tensor, value, true);
        for line in [QUANTIZE, ROUND, EVAL, GENERATE] {
            world.refuses(line, &["model", tensor, "index 0", "damaged"]);
        }
        world.restore();
    }
}

/// What is copied in the type it has is checked too.
/// Masks that transformers once saved: one is -1e9, another -inf, which no f16 is to hold.
#[test]
fn buffers_of_old_checkpoints_are_left_out() {
    let world = world();
    let name = "model/model.safetensors";
    let file = world.read(name);
    let (mut header, data) = safetensors_file::parts(&file);
    let mut data = data.to_vec();
    for (buffer, value) in [("masked_bias", -1e9f32), ("bias", f32::NEG_INFINITY)] {
        let entry =
            json!({ "dtype": "F32", "shape": [1], "data_offsets": [data.len(), data.len() + 4] });
        header.insert(format!("model.layers.0.attn.{buffer}"), entry);
        data.extend(value.to_le_bytes());
    }
    world.write(name, safetensors_file::file(&serde_json::to_string(&header).unwrap(), &data));
    for line in [QUANTIZE, ROUND] {
        let report = world.json(&format!("{line} --json --overwrite"));
        assert!(report["totals"]["modules"].as_u64() > Some(0));
        let saved = world.read("out/model.safetensors");
        let (header, _) = safetensors_file::parts(&saved);
        assert!(header.keys().all(|tensor| !tensor.contains(".attn.")));
    }
    world.ok("verify out -q");
}

#[test]
fn a_copied_tensor_with_one_nan() {
    let world = world();
    let mut bytes = safetensors_file::as_bf16(&world.read(NAME));
    for tensor in ["lm_head.weight", "model.embed_tokens.weight"] {
        let last = safetensors_file::range(&bytes, tensor).end - 2;
        let sound = bytes[last..last + 2].to_vec();
        bytes[last..last + 2].copy_from_slice(&[0xc0, 0x7f]);
        world.write(NAME, &bytes);
        for line in [QUANTIZE, ROUND] {
            world.refuses(line, &[tensor, "NaN", "index 16383", "damaged"]);
        }
        bytes[last..last + 2].copy_from_slice(&sound);
    }
}

#[test]
fn scales_that_are_not_numbers() {
    let world = world();
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    let mut bytes = world.read("q/model.safetensors");
    let tensor = "model.layers.1.mlp.up_proj.scales";
    let start = safetensors_file::range(&bytes, tensor).start;
    for half in [[0x00, 0x7e], [0x00, 0xfc]] {
        bytes[start..start + 2].copy_from_slice(&half);
        world.write("q/model.safetensors", &bytes);
        for line in [EVAL, GENERATE] {
            let line = line.replacen("model", "q", 1);
            world.refuses(&line, &["q/model.safetensors", tensor, "index 0", "damaged"]);
        }
        assert_eq!(world.gptq("verify q").status.code(), Some(1));
    }
}

#[test]
fn finite_weights_whose_activations_overflow() {
    let world = world();
    // Half precision cannot hold the scale of the first; the second does not fit by itself.
    world.fill(Q_PROJ, 1e20, true);
    for line in [QUANTIZE, ROUND] {
        world.refuses(line, &["model.layers.0.self_attn.q_proj", "scale"]);
    }
    world.restore();
    world.fill("model.embed_tokens.weight", 1e30, false);
    world.refuses(QUANTIZE, &["model.embed_tokens.weight", "float16"]);
    world.restore();

    // In bfloat16 the weights fit, and their products do not.
    let bytes = safetensors_file::as_bf16(&world.read(NAME));
    world.edit("model/config.json", |config| config["torch_dtype"] = json!("bfloat16"));
    for (layer, sequential) in [(0, ""), (0, " --no-true-sequential"), (1, " --no-true-sequential")]
    {
        let mut bytes = bytes.clone();
        for module in ["up_proj", "gate_proj"] {
            fill_bf16(&mut bytes, &format!("model.layers.{layer}.mlp.{module}.weight"), 1e30);
        }
        world.write(NAME, bytes);
        world.refuses(EVAL, &["`model`", "all its weights are finite", "so large"]);
        world.refuses(GENERATE, &["`model`", "all its weights are finite", "so large"]);
        world.refuses(&format!("{QUANTIZE}{sequential}"), &["layer", "model.layers."]);
    }
}

/// Behind the last stage of the last block nothing is solved any more.
#[test]
fn activations_that_overflow_behind_the_last_solved_stage() {
    let world = world();
    let skip = json!({ r"-:model\.layers\.1\.mlp\.down_proj": {} });
    world.write("rules.json", skip.to_string());
    let mut bytes = safetensors_file::as_bf16(&world.read(NAME));
    world.edit("model/config.json", |config| config["torch_dtype"] = json!("bfloat16"));
    fill_bf16(&mut bytes, "model.layers.1.mlp.down_proj.weight", 3e38);
    world.write(NAME, bytes);
    for sequential in ["", " --no-true-sequential"] {
        let line = format!("{QUANTIZE} --dynamic rules.json{sequential}");
        world.refuses(&line, &["layer 1", "outputs of model.layers.1.mlp.down_proj", "not finite"]);
    }
}

fn fill_bf16(file: &mut [u8], tensor: &str, value: f32) {
    let range = safetensors_file::range(file, tensor);
    for element in file[range].chunks_exact_mut(2) {
        element.copy_from_slice(&value.to_le_bytes()[2..]);
    }
}

/// A tokenizer may have more tokens than the model: many models leave some out. One that is used is an error.
#[test]
fn a_tokenizer_with_more_tokens_than_the_model() {
    let world = world();
    world.edit("model/tokenizer.json", |tokenizer| {
        tokenizer["added_tokens"] = json!([{
            "id": 256, "content": "<new>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        }]);
    });
    for line in [QUANTIZE, EVAL, GENERATE] {
        world.ok(line);
    }
    std::fs::remove_dir_all(world.path("out")).unwrap();
    world.write("new.txt", format!("a<new>{}", "b ".repeat(600)));
    let line = QUANTIZE.replace("text.txt", "new.txt");
    world.refuses(&line, &["new.txt", "token 256", "vocabulary of 256"]);
    let parts = &["`model`", "token 256", "the 256 tokens of the model", "belong together"];
    world.refuses(&EVAL.replace("text.txt", "new.txt"), parts);
    world.refuses("generate model --prompt a<new>b -q", parts);
    world.edit("model/tokenizer_config.json", |config| config["bos_token"] = json!("<new>"));
    world.refuses("quantize model -o out --nsamples 2 --seqlen 16 -q", parts);
}

/// What `gptq logits` reads besides a model, and what it refuses to write.
#[test]
fn ids_that_are_no_tokens_and_logits_that_are_no_numbers() {
    let world = world();
    let file = |dtype: &str, shape: &str, data: &[u8]| {
        let end = data.len();
        let header = json!({ "input_ids": { "dtype": dtype, "data_offsets": [0, end] } });
        let header =
            header.to_string().replace("\"dtype\"", &format!("\"shape\":{shape},\"dtype\""));
        world.write("ids.safetensors", safetensors_file::file(&header, data));
    };
    let line = "logits model --input ids.safetensors --output out.safetensors -q";
    for (dtype, shape, id, part) in [
        ("I32", "[1,1]", 256, "token 256"),
        ("I32", "[1,1]", -1, "negative"),
        ("I32", "[1]", 0, "[batch, seq]"),
        ("F32", "[1,1]", 0, "input_ids"),
    ] {
        file(dtype, shape, &i32::to_le_bytes(id));
        world.refuses(line, &["ids.safetensors", part]);
    }
    file("I32", "[1,0]", b"");
    world.refuses(line, &["ids.safetensors", "input_ids is empty"]);
    file("I32", "[1,1]", &[1, 0, 0, 0]);
    for value in [f32::NAN, f32::INFINITY] {
        world.fill("lm_head.weight", value, false);
        world.refuses(line, &["model.safetensors", "lm_head.weight", "damaged"]);
    }
    still_works(&world, line);
}

fn still_works(world: &World, line: &str) {
    world.restore();
    world.ok(line);
    assert!(world.path("out.safetensors").exists());
}
