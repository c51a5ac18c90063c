use gptq_testkit::fixtures;
use serde_json::json;

use super::*;

/// A byte-level tokenizer of single bytes and a few merges, as tokenizer.json.
fn byte_level_json() -> Value {
    serde_json::from_str(&byte_level_text()).unwrap()
}

fn byte_level_text() -> String {
    // The alphabet of byte-level BPE: printable bytes stand for themselves, the others for characters from U+0100 on.
    let mut next = 0x100;
    let alphabet: Vec<char> = (0..=255u8)
        .map(|b| match b {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(b),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap()
            }
        })
        .collect();
    let mut vocab: Map<String, Value> =
        (0..).zip(alphabet).map(|(id, c)| (c.to_string(), json!(id))).collect();
    for (token, id) in [("he", 256), ("ll", 257), ("hell", 258), ("Ġhe", 259)] {
        vocab.insert(token.into(), json!(id));
    }
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [{"id": 260, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"], ["Ġ", "he"]]},
    })
    .to_string()
}

/// A directory with these files.
fn directory(files: &[(&str, &Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, value) in files {
        let text = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn load(files: &[(&str, &Value)]) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_dir(directory(files).path())
}

#[test]
fn text_survives_the_round_trip() {
    let t = load(&[("tokenizer.json", &byte_level_json())]).unwrap();
    assert_eq!(t.vocab_size(), 261);
    // Not truncated to the 4 tokens of the file's training settings.
    assert_eq!(t.encode("hello hey", false).unwrap(), [258, 111, 259, 121]);
    for text in ["", "hello", "  a\n\nb ", "naïve 日本語 🦀", "<s>hell</s>", "\u{0}\u{FFFD}"]
    {
        let ids = t.encode(text, true).unwrap();
        assert_eq!(t.decode(&ids, false).unwrap(), text);
    }
    assert_eq!(t.decode(&[260, 258, 260], true).unwrap(), "hell");
    assert_eq!(t.decode(&[9999, 258], true).unwrap(), "hell");
    assert_eq!(
        (t.token(258).as_deref(), t.id("hell"), t.token(999)),
        (Some("hell"), Some(258), None)
    );
}

#[test]
fn the_stream_holds_back_what_is_incomplete() {
    let t = load(&[("tokenizer.json", &byte_level_json())]).unwrap();
    for text in ["hello 日本語 🦀 naïve", "🦀🦀", "", " x"] {
        let mut stream = t.decode_stream();
        let mut out = String::new();
        for id in t.encode(text, false).unwrap() {
            let piece = stream.push(id).unwrap();
            assert!(!piece.as_deref().unwrap_or_default().contains('\u{FFFD}'));
            out.extend(piece);
        }
        assert_eq!(stream.flush().unwrap(), None);
        assert_eq!(out, text);
    }
    // A broken character: two of the crab's four bytes, then text; then at the end.
    let crab = t.encode("🦀", false).unwrap();
    let mut stream = t.decode_stream();
    assert_eq!(stream.push(crab[0]).unwrap(), None);
    assert_eq!(stream.push(crab[1]).unwrap(), None);
    assert_eq!(stream.push(256).unwrap().as_deref(), Some("\u{FFFD}he"));
    assert_eq!(stream.push(crab[0]).unwrap(), None);
    assert_eq!(stream.flush().unwrap().as_deref(), Some("\u{FFFD}"));
    assert_eq!(stream.push(256).unwrap().as_deref(), Some("he"));
    // Bytes that never become a character do not pile up.
    let mut given = 0;
    for _ in 0..100 {
        given += stream.push(crab[1]).unwrap().map_or(0, |s| s.chars().count());
    }
    assert!(given >= 90, "{given}");
}

#[test]
fn special_tokens_come_from_the_config_and_are_added() {
    let config = json!({
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": false},
        "pad_token": null,
        "added_tokens_decoder": {"262": {"content": "<x>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": false}},
        "additional_special_tokens": ["<turn>"],
    });
    let map = json!({"unk_token": "he"});
    let t = load(&[
        ("tokenizer.json", &byte_level_json()),
        ("tokenizer_config.json", &config),
        ("special_tokens_map.json", &map),
    ])
    .unwrap();
    assert_eq!(
        (t.bos_id(), t.eos_id(), t.pad_id(), t.unk_id()),
        (Some(260), Some(262), None, Some(256))
    );
    assert_eq!(t.encode("<x></s><turn>he", false).unwrap(), [261, 262, 263, 256]);
    assert_eq!(t.vocab_size(), 264);
}

#[test]
fn the_chat_template_is_found() {
    let json = byte_level_json();
    let load = |config: Value, jinja: Option<&str>| {
        let jinja = json!(jinja.unwrap_or_default());
        let mut files = vec![("tokenizer.json", &json), ("tokenizer_config.json", &config)];
        if jinja != "" {
            files.push(("chat_template.jinja", &jinja));
        }
        load(&files).unwrap()
    };
    let now = std::time::UNIX_EPOCH;
    let say = |t: &Tokenizer| t.apply_chat_template(&[Message::new("user", "x")], false, now);
    let named = json!([{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]);
    assert_eq!(
        say(&load(json!({"chat_template": "{{ messages[0].content }}!"}), None)).unwrap(),
        "x!"
    );
    assert_eq!(
        say(&load(json!({"chat_template": named, "bos_token": "<s>"}), None)).unwrap(),
        "<s>yes"
    );
    assert_eq!(say(&load(json!({"chat_template": "config"}), Some("file"))).unwrap(), "file");
    let none = load(json!({}), None);
    assert!(none.chat_template().is_none());
    assert!(say(&none).unwrap_err().to_string().contains("no chat template"));
    let broken = load(json!({}), Some("{% if %}"));
    assert!(broken.chat_template().is_none());
    assert!(say(&broken).unwrap_err().to_string().contains("chat_template.jinja`, line 1"));
}

#[test]
fn malformed_directories_are_named() {
    let message = |files: &[(&str, &Value)]| load(files).unwrap_err().to_string();
    assert!(message(&[]).contains("no tokenizer.json"));
    assert!(message(&[("vocab.json", &json!({}))]).contains("slow tokenizer"));
    assert!(message(&[("tokenizer.json", &json!("{ no json"))]).contains("tokenizer.json"));
    assert!(message(&[("tokenizer.json", &json!({"version": "1.0"}))]).contains("tokenizer.json"));
    let json = byte_level_json();
    assert!(
        message(&[("tokenizer.json", &json), ("tokenizer_config.json", &json!([1]))])
            .contains("tokenizer_config.json")
    );
    assert!(
        message(&[("tokenizer.json", &json), ("tokenizer_config.json", &json!("nonsense"))])
            .contains("tokenizer_config.json")
    );
}

#[test]
fn a_merge_longer_than_every_token_is_an_error() {
    let mut json = byte_level_json();
    json["model"]["merges"] = json!([["hell", "hell"]]);
    let message = load(&[("tokenizer.json", &json)]).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
}

#[test]
fn saving_copies_the_files() {
    let config = json!({"bos_token": "<s>", "chat_template": "x"});
    let source = directory(&[
        ("tokenizer.json", &byte_level_json()),
        ("tokenizer_config.json", &config),
        ("merges.txt", &json!("#")),
        ("model.txt", &json!("no")),
    ]);
    let t = Tokenizer::from_dir(source.path()).unwrap();
    let target = tempfile::tempdir().unwrap();
    t.save(target.path()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "merges.txt"] {
        let read = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(read(source.path()), read(target.path()));
    }
    assert!(!target.path().join("model.txt").exists());
    // Onto itself: nothing is lost.
    t.save(source.path()).unwrap();
    assert_eq!(Tokenizer::from_dir(source.path()).unwrap().vocab_size(), 261);
}

#[test]
fn fixture_tokenizers_load() {
    for name in ["llama_q_src", "llama_q_tail_src"] {
        let Some(dir) = fixtures::dir(name).filter(|d| d.join("tokenizer.json").exists()) else {
            continue;
        };
        let t = Tokenizer::from_dir(&dir).unwrap();
        assert_eq!(t.vocab_size(), 256);
        assert_eq!((t.pad_id(), t.bos_id(), t.eos_id()), (Some(0), Some(1), Some(2)));
        let text = "hello, wörld";
        let ids = t.encode(text, true).unwrap();
        assert_eq!(t.decode(&ids, false).unwrap(), text);
    }
}

/// SentencePiece as Llama 2 has it: no pre-tokenizer, and a space before the text.
fn sentencepiece_json() -> Value {
    let mut vocab: Map<String, Value> = Map::new();
    let merges =
        [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "a"), ("aa", "aa"), ("o", "n"), ("e", "▁t")];
    for c in ["<unk>", "▁"].into_iter().map(str::to_owned).chain(('a'..='z').map(String::from)) {
        vocab.insert(c, json!(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for (left, right) in merges {
        vocab.insert(format!("{left}{right}"), json!(vocab.len()));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
}

#[test]
fn parts_join_to_the_tokens_of_the_whole() {
    let words = [
        "the", " then", "\n", " hello", "  ", "日本", " é", " 12345", "\r\n\n", "aaaaa", "'s", "🦀",
    ];
    let mut state = 1u32;
    let mixed: String = (0..6000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            words[(state >> 16) as usize % words.len()]
        })
        .collect();
    let texts = [
        mixed,
        "a".repeat(20_000),
        // Runs of which two pieces see another half, behind and before text with a seam.
        format!("{}{}{}", "the hell ".repeat(500), "a".repeat(6001), " then hello".repeat(500)),
        format!("{}{}{}", "the hell ".repeat(500), "l".repeat(6001), " then hello".repeat(500)),
        " ".repeat(20_000),
        "\n \t".repeat(5_000),
        "é".repeat(7_001),
        "short".into(),
        String::new(),
    ];
    let mut grown = 0;
    for json in [byte_level_json(), sentencepiece_json()] {
        let t = load(&[("tokenizer.json", &json)]).unwrap();
        for text in &texts {
            let whole = t.encode(text, false).unwrap();
            for (piece, overlap) in [(2000, 600), (3001, 999), (1 << 20, 600)] {
                let parts = Parts::new(&t, text, long::Sizes { piece, overlap });
                let parts: Vec<Vec<u32>> = parts.map(Result::unwrap).collect();
                let name: String = text.chars().take(10).collect();
                assert_eq!(parts.concat(), whole, "{name:?} in pieces of {piece}");
                let most = text.len().saturating_sub(piece).div_ceil(piece - overlap) + 1;
                assert!(parts.len() <= most, "{} parts", parts.len());
                grown += usize::from(text.starts_with("the hell") && parts.len() < most);
                if text.len() > 2 * piece && text.contains("the") {
                    assert!(parts.len() > 2, "one piece");
                }
            }
        }
    }
    assert!(grown > 0, "no piece grew behind a seam");
}

/// A tokenizer may split a text by what comes far behind: then parts that were given are wrong.
#[test]
fn tokens_that_change_with_far_text_are_an_error() {
    let mut json = byte_level_json();
    json["pre_tokenizer"] = json!({"type": "Split", "invert": false, "behavior": "Isolated",
        "pattern": {"Regex": r"[\s\S]*END|\w+ "}});
    json["model"] =
        json!({"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "ab ": 1, "cd ": 2}});
    json["added_tokens"] = json!([]);
    json["decoder"] = json!(null);
    let t = load(&[("tokenizer.json", &json)]).unwrap();
    let text = format!("{}END", "ab cd ".repeat(1000));
    let mut parts = Parts::new(&t, &text, long::Sizes { piece: 1000, overlap: 400 });
    assert_eq!(parts.next().unwrap().unwrap()[..3], [1, 2, 1]);
    let error = parts.find_map(Result::err).unwrap().to_string();
    assert!(error.contains("far behind"), "{error}");
    assert!(parts.next().is_none());
}

/// Pieces that never agree become one.
#[test]
fn a_text_that_cannot_be_cut_is_encoded_whole() {
    let mut json = byte_level_json();
    // Each text one word: what is known depends on all of it.
    json["pre_tokenizer"] = json!(null);
    json["model"] = json!({"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0}});
    json["added_tokens"] = json!([]);
    let t = load(&[("tokenizer.json", &json)]).unwrap();
    let text = "ab".repeat(4000);
    let parts = Parts::new(&t, &text, long::Sizes { piece: 1000, overlap: 200 });
    let parts: Vec<Vec<u32>> = parts.map(Result::unwrap).collect();
    assert_eq!(parts, [t.encode(&text, false).unwrap()]);
}

#[test]
fn real_text_in_parts() {
    let Some(gguf) = fixtures::smollm2_gguf() else { return };
    let Some(text) = fixtures::shared_text("wikitext2-test.txt") else { return };
    let t = Tokenizer::from_gguf(&GgufFile::open(&gguf).unwrap()).unwrap();
    let text = std::fs::read_to_string(text).unwrap();
    let parts: Vec<Vec<u32>> = t.encode_long(&text).map(Result::unwrap).collect();
    assert!(parts.len() > 3);
    assert_eq!(parts.concat(), t.encode(&text, false).unwrap());
}
