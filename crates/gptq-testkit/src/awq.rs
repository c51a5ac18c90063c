//! Checkpoints in AutoAWQ's layout "gemm", made of GPTQ's 4-bit ones with the same codes.

use std::path::Path;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

/// Place, in four bits from the lowest, of each of eight neighbouring outputs in a word.
const PLACES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Packs codes, eight neighbours a word.
///
/// # Panics
/// If they do not fill whole words or a code has more than four bits.
pub fn pack(codes: &[u8]) -> Vec<u32> {
    assert_eq!(codes.len() % 8, 0, "whole words");
    let word = |codes: &[u8]| {
        codes.iter().zip(PLACES).fold(0, |word, (&code, place)| {
            assert!(code < 16, "code {code}");
            word | u32::from(code) << (4 * place)
        })
    };
    codes.chunks_exact(8).map(word).collect()
}

/// Writes the 4-bit checkpoint of one file in `from`, whose groups are `k / group_size`, as AutoAWQ
/// would have.
///
/// # Panics
/// If a file cannot be read or written, or the checkpoint is another one.
pub fn rewrite(from: &Path, to: &Path) {
    let read = |name: &str| {
        let path = from.join(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = to.join(name);
        std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    };
    let config = serde_json::from_slice(&read("config.json"));
    let mut config: Value = config.unwrap_or_else(|error| panic!("config.json: {error}"));
    let settings = config["quantization_config"].clone();
    assert_eq!((&settings["bits"], &settings["desc_act"]), (&json!(4), &json!(false)));
    let one = u32::from(settings["checkpoint_format"] == "gptq");
    config["quantization_config"] = json!({
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": settings["group_size"],
        "zero_point": true, "modules_to_not_convert": null,
    });
    write("config.json", config.to_string().as_bytes());

    let file = read("model.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap_or_else(|error| panic!("{error}"));
    let mut out: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in tensors.tensors() {
        let words =
            || tensor.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let bytes = |codes: &[u8]| pack(codes).iter().flat_map(|w| w.to_le_bytes()).collect();
        let shape = tensor.shape();
        if name.ends_with(".g_idx") {
            continue;
        }
        if name.ends_with(".qweight") {
            // Inputs 8 r to 8 r + 7 of an output are in one word.
            let (inputs, outputs) = (8 * shape[0], shape[1]);
            let mut codes = vec![0; inputs * outputs];
            for (at, word) in words().enumerate() {
                for input in 0..8 {
                    let code = word >> (4 * input) & 0xF;
                    codes[(at / outputs * 8 + input) * outputs + at % outputs] = code as u8;
                }
            }
            out.push((name, Dtype::I32, vec![inputs, outputs / 8], bytes(&codes)));
        } else if name.ends_with(".qzeros") {
            let field = |word: u32, output: u32| ((word >> (4 * output) & 0xF) + one) as u8 & 0xF;
            let zeros: Vec<u8> =
                words().flat_map(|word| (0..8).map(move |output| field(word, output))).collect();
            out.push((name, Dtype::I32, shape.to_vec(), bytes(&zeros)));
        } else {
            out.push((name, tensor.dtype(), shape.to_vec(), tensor.data().to_vec()));
        }
    }
    let views = out.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        (name.as_str(), view.unwrap_or_else(|error| panic!("{name}: {error}")))
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let bytes = safetensors::serialize(views, Some(metadata));
    write("model.safetensors", &bytes.unwrap_or_else(|error| panic!("{error}")));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        if from.join(name).exists() {
            write(name, &read(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outputs_take_every_other_place() {
        assert_eq!(pack(&[0, 1, 2, 3, 4, 5, 6, 7]), [0x7531_6420]);
    }
}
