use std::fs;

use serde_json::{Value, json};

use crate::gguf::testing::{Builder, tiny_llama};
use crate::gguf::{GgufArray, GgufFile, GgufValue, GgufWriter};
use crate::tokenizer::Tokenizer;

/// Saves `tokenizer` as a GGUF file and rebuilds it from there.
fn through_gguf(tokenizer: &Tokenizer, rows: usize) -> (GgufFile, Tokenizer) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let mut metadata = vec![("general.architecture".to_owned(), GgufValue::String("llama".into()))];
    metadata.extend(tokenizer.gguf_metadata(rows, &[]).unwrap().metadata);
    GgufWriter::create(&path, false, &metadata, &[]).unwrap().finish().unwrap();
    let gguf = GgufFile::open(&path).unwrap();
    let rebuilt = Tokenizer::from_gguf(&gguf).unwrap();
    (gguf, rebuilt)
}

fn from_json(json: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn to_json(tokenizer: &Tokenizer) -> Value {
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    serde_json::from_slice(&fs::read(dir.path().join("tokenizer.json")).unwrap()).unwrap()
}

fn refused(json: &Value, part: &str) {
    let message = from_json(json).gguf_metadata(300, &[]).unwrap_err().to_string();
    assert!(message.contains(part), "{message}");
}

fn sentencepiece() -> Builder {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(["\u{2581}", "a", "b", "ab", "\u{2581}a", "\u{2581}ab"].map(String::from));
    let texts: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let types: Vec<i32> = (0..tokens.len())
        .map(|id| match id {
            0 => 2,
            1 | 2 => 3,
            3..259 => 6,
            _ => 1,
        })
        .collect();
    tiny_llama("llama")
        .str("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &texts)
        .f32s("tokenizer.ggml.scores", &scores)
        .i32s("tokenizer.ggml.token_type", &types)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
}

#[test]
fn tokenizers_survive_the_way_through_gguf() {
    let pre = |name: &str| tiny_llama("llama").str("tokenizer.ggml.pre", name);
    for builder in [
        pre("gpt-2"),
        pre("smollm"),
        pre("llama-bpe"),
        pre("smaug-bpe").bool("tokenizer.ggml.add_bos_token", true),
        pre("qwen2"),
        pre("tekken"),
        sentencepiece(),
        sentencepiece().bool("tokenizer.ggml.add_space_prefix", false),
    ] {
        let gguf = builder.open();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let rows = tokenizer.vocab_size();
        let (again_gguf, again) = through_gguf(&tokenizer, rows + 2);
        let key = "tokenizer.ggml.pre";
        if gguf.str("tokenizer.ggml.model").unwrap() == Some("gpt2") {
            assert_eq!(gguf.str(key).unwrap(), again_gguf.str(key).unwrap());
        }
        for text in ["ab a b", "<s>ab</s> b", " a"] {
            assert_eq!(
                tokenizer.encode(text, true).unwrap(),
                again.encode(text, true).unwrap(),
                "{text}"
            );
        }
        assert_eq!(
            (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id(), tokenizer.unk_id()),
            (again.bos_id(), again.eos_id(), again.pad_id(), again.unk_id())
        );
        assert_eq!(
            tokenizer.chat_template().unwrap().source(),
            again.chat_template().unwrap().source()
        );
        // Rows of the embedding beyond the vocabulary.
        assert_eq!(again.vocab_size(), rows + 2);
        let types = again_gguf.value("tokenizer.ggml.token_type").unwrap();
        let GgufValue::Array(GgufArray::I32(types)) = types else { panic!("{types:?}") };
        assert_eq!(types[rows..], [5, 5]);
    }
}

#[test]
fn the_tokenizer_of_the_fixtures_is_gpt2s() {
    let tokenizer = from_json(&gptq_testkit::byte_level_tokenizer());
    let (gguf, again) = through_gguf(&tokenizer, 256);
    assert_eq!(gguf.str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));
    assert_eq!(
        tokenizer.encode("héllo 12", true).unwrap(),
        again.encode("héllo 12", true).unwrap()
    );
}

#[test]
fn ends_of_a_turn_get_their_keys() {
    let tokenizer = Tokenizer::from_gguf(&tiny_llama("llama").open()).unwrap();
    let metadata = tokenizer.gguf_metadata(8, &[7, 5]).unwrap().metadata;
    let id = |key: &str| {
        metadata
            .iter()
            .find(|(k, _)| *k == format!("tokenizer.ggml.{key}_token_id"))
            .map(|(_, v)| v)
    };
    assert_eq!(id("eos"), Some(&GgufValue::Uint(7)));
    assert_eq!(id("eot"), Some(&GgufValue::Uint(5)));
    assert_eq!(id("eom"), None);
}

#[test]
fn what_llama_cpp_would_do_otherwise_is_refused() {
    let good = gptq_testkit::byte_level_tokenizer();
    let with = |path: &[&str], value: Value| {
        let mut json = good.clone();
        let mut at = &mut json;
        for key in path {
            at = &mut at[*key];
        }
        *at = value;
        json
    };
    refused(&with(&["pre_tokenizer", "add_prefix_space"], json!(true)), "not certain");
    refused(&with(&["pre_tokenizer"], json!(null)), "not certain");
    refused(&with(&["model", "ignore_merges"], json!(true)), "not certain");
    refused(&with(&["normalizer"], json!({"type": "Lowercase"})), "normalizer");
    refused(&with(&["normalizer"], json!({"type": "NFC"})), "not certain");
    refused(&with(&["model", "byte_fallback"], json!(true)), "not that of Llama 2");
    let few = from_json(&good).gguf_metadata(200, &[]).unwrap_err().to_string();
    assert!(few.contains("200 token embeddings"), "{few}");
}

#[test]
fn a_space_that_llama_cpp_puts_elsewhere_is_told() {
    let tokenizer = Tokenizer::from_gguf(&sentencepiece().open()).unwrap();
    let json = to_json(&tokenizer);
    let differs = |scheme: Option<&str>| {
        let mut json = json.clone();
        if let Some(scheme) = scheme {
            json["normalizer"] = Value::Null;
            json["pre_tokenizer"] = json!({
                "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false
            });
        }
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let found = tokenizer.gguf_metadata(tokenizer.vocab_size(), &[]).unwrap();
        let (_, again) = through_gguf(&tokenizer, tokenizer.vocab_size());
        let same = ["<s>ab", " ab", "ab"].map(|text| {
            tokenizer.encode(text, false).unwrap() == again.encode(text, false).unwrap()
        });
        (found.differs, same)
    };
    assert_eq!(differs(None), (None, [true; 3]));
    assert_eq!(differs(Some("never")), (None, [true; 3]));
    let (told, same) = differs(Some("first"));
    assert!(told.unwrap().contains("behind special tokens"));
    assert_eq!(same, [false, false, true]);
    let (told, same) = differs(Some("always"));
    assert!(told.unwrap().contains("begins with one"));
    assert_eq!(same, [true, false, true]);
}

#[test]
fn merges_that_scores_cannot_say_are_refused() {
    let tokenizer = Tokenizer::from_gguf(&sentencepiece().open()).unwrap();
    let json = to_json(&tokenizer);
    let merges = json["model"]["merges"].as_array().unwrap().clone();
    assert_eq!(merges.len(), 4);
    let with = |merges: Vec<Value>| {
        let mut json = json.clone();
        json["model"]["merges"] = Value::Array(merges);
        json
    };
    refused(&with(merges[1..].to_vec()), "though the result is a token");
    let ab = json!(["\u{2581}", "ab"]);
    let apart: Vec<Value> = merges
        .iter()
        .filter(|m| **m != ab)
        .cloned()
        .chain([merges[0].clone(), ab.clone()])
        .collect();
    refused(&with(apart), "come back");
}
