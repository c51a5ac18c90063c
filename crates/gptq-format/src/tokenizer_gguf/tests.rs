use crate::gguf::testing::{Builder, tiny_llama};
use crate::tokenizer::Tokenizer;

fn build(b: &Builder) -> Tokenizer {
    Tokenizer::from_gguf(&b.open()).unwrap()
}

fn message(b: &Builder) -> String {
    Tokenizer::from_gguf(&b.open()).unwrap_err().to_string()
}

/// A SentencePiece vocabulary: unknown, BOS, EOS, all bytes, and some pieces.
fn sentencepiece() -> Builder {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let pieces = [
        ("▁", -1.0),
        ("a", -2.0),
        ("b", -3.0),
        ("ab", -4.0),
        ("▁a", -5.0),
        ("▁ab", -6.0),
        ("<turn>", 0.0),
    ];
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    tokens.extend(bytes.iter().map(String::as_str));
    tokens.extend(pieces.map(|(t, _)| t));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1, 1, 1, 1, 1, 1, 4]);
    let mut scores = vec![0.0; 259];
    scores.extend(pieces.map(|(_, s)| s));
    tiny_llama("llama")
        .str("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .f32s("tokenizer.ggml.scores", &scores)
        .without("tokenizer.ggml.bos_token_id")
        .without("tokenizer.ggml.eos_token_id")
        .without("tokenizer.ggml.merges")
}

#[test]
fn byte_level_is_rebuilt() {
    let t = build(&tiny_llama("llama"));
    assert_eq!((t.bos_id(), t.eos_id(), t.pad_id(), t.vocab_size()), (Some(6), Some(7), None, 8));
    assert_eq!(t.encode("ab ab<s>a", true).unwrap(), [3, 5, 6, 0]);
    assert_eq!(t.decode(&[6, 3, 5], true).unwrap(), "ab ab");
    let both = tiny_llama("llama")
        .bool("tokenizer.ggml.add_bos_token", true)
        .bool("tokenizer.ggml.add_eos_token", true);
    assert_eq!(build(&both).encode("ab", true).unwrap(), [6, 3, 7]);
    assert_eq!(build(&both).encode("ab", false).unwrap(), [3]);
}

#[test]
fn llama3_begins_with_bos_and_takes_whole_words() {
    let b = tiny_llama("llama")
        .str("tokenizer.ggml.pre", "llama-bpe")
        .strings("tokenizer.ggml.tokens", &["a", "b", "c", "ab", "Ġ", "abc", "<s>", "</s>"])
        .strings("tokenizer.ggml.merges", &["a b"]);
    // No merge makes "abc", but the word is a token.
    assert_eq!(build(&b).encode("abc", true).unwrap(), [6, 5]);
}

#[test]
fn digits_are_single_where_the_model_has_them_so() {
    let digits = |pre: &str| {
        let b = tiny_llama("llama")
            .str("tokenizer.ggml.pre", pre)
            .strings("tokenizer.ggml.tokens", &["1", "2", "12", "Ġ", "x", "y", "<s>", "</s>"])
            .strings("tokenizer.ggml.merges", &["1 2"]);
        build(&b).encode("12", false).unwrap()
    };
    assert_eq!(digits("gpt-2"), [2]);
    assert_eq!(digits("llama3"), [2]);
    assert_eq!(digits("smollm"), [0, 1]);
    assert_eq!(digits("qwen2"), [0, 1]);
    assert_eq!(digits("tekken"), [0, 1]);
}

#[test]
fn sentencepiece_is_rebuilt_from_scores() {
    let t = build(&sentencepiece());
    assert_eq!((t.unk_id(), t.bos_id(), t.eos_id()), (Some(0), Some(1), Some(2)));
    // "▁ab" from "▁" + "ab", then from "▁a" + "b": the better score of "ab" wins, and both give the same token.
    assert_eq!(t.encode("ab", true).unwrap(), [1, 264]);
    assert_eq!(t.encode("ab", false).unwrap(), [264]);
    // Bytes where there is no piece, and added tokens matched in the text.
    assert_eq!(t.encode("é", false).unwrap(), [259, 3 + 0xC3, 3 + 0xA9]);
    assert_eq!(t.encode("a<turn></s>", false).unwrap(), [263, 265, 2]);
    for text in ["ab ba  a", "é\n日本", "  x"] {
        assert_eq!(t.decode(&t.encode(text, true).unwrap(), true).unwrap(), text);
    }
    let plain = build(
        &sentencepiece()
            .bool("tokenizer.ggml.add_space_prefix", false)
            .bool("tokenizer.ggml.add_bos_token", false),
    );
    assert_eq!(plain.encode("ab", true).unwrap(), [262]);
    assert_eq!(plain.decode(&[264], true).unwrap(), " ab");
}

#[test]
fn a_stream_of_single_bytes_is_the_text() {
    let t = build(&sentencepiece());
    let streamed = |ids: &[u32]| {
        let mut stream = t.decode_stream();
        let mut pieces: Vec<String> =
            ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
        pieces.extend(stream.flush().unwrap());
        pieces
    };
    for text in ["ab a日", "日本", "🦀🦀 ❤️b", "é日🦀a"] {
        let pieces = streamed(&t.encode(text, true).unwrap());
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')), "{pieces:?}");
    }
    let byte = |b: u32| 3 + b;
    // Two of three bytes of a character behind a whole one, which stays; then text, or the end.
    let broken = [0xE6, 0x97, 0xA5, 0xE6, 0x9C].map(byte);
    assert_eq!(streamed(&broken).concat(), "日\u{FFFD}\u{FFFD}");
    assert_eq!(streamed(&[&broken[..], &[260]].concat()).concat(), "日\u{FFFD}\u{FFFD}a");
    // Bytes that never become a character do not pile up.
    assert!(streamed(&[byte(0x9F); 100]).len() >= 20);
    // A token without text does not take the space in front of the next.
    assert_eq!(streamed(&[263, 2, 263]).concat(), "a a");
    assert_eq!(t.decode(&[263, 2, 263], true).unwrap(), "a a");
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    for b in [tiny_llama("llama").bool("tokenizer.ggml.add_bos_token", true), sentencepiece()] {
        let t = build(&b);
        let dir = tempfile::tempdir().unwrap();
        t.save(dir.path()).unwrap();
        let again = Tokenizer::from_dir(dir.path()).unwrap();
        for text in ["ab ab a", "<s>ab</s> b"] {
            assert_eq!(t.encode(text, true).unwrap(), again.encode(text, true).unwrap());
        }
        assert_eq!(
            (t.bos_id(), t.eos_id(), t.vocab_size()),
            (again.bos_id(), again.eos_id(), again.vocab_size())
        );
        assert_eq!(t.chat_template().unwrap().source(), again.chat_template().unwrap().source());
        let config: serde_json::Value = serde_json::from_slice(
            &std::fs::read(dir.path().join("tokenizer_config.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
        assert_eq!(config["model_max_length"], 256);
        assert_eq!(config["bos_token"], "<s>");
        let id = t.bos_id().unwrap().to_string();
        assert_eq!(config["added_tokens_decoder"][id]["content"], "<s>");
    }
}

#[test]
fn what_cannot_be_rebuilt_is_named() {
    let t = tiny_llama("llama");
    assert!(
        message(&t.clone().str("tokenizer.ggml.model", "bert"))
            .contains("tokenizer.ggml.model = `bert`")
    );
    assert!(
        message(&t.clone().str("tokenizer.ggml.pre", "chameleon"))
            .contains("tokenizer.ggml.pre = `chameleon`")
    );
    assert!(message(&t.clone().without("tokenizer.ggml.tokens")).contains("tokenizer.ggml.tokens"));
    assert!(message(&t.clone().without("tokenizer.ggml.merges")).contains("tokenizer.ggml.merges"));
    assert!(message(&t.clone().i32s("tokenizer.ggml.token_type", &[1])).contains("one per token"));
    assert!(message(&t.clone().u32("tokenizer.ggml.bos_token_id", 8)).contains("an id below 8"));
    assert!(message(&t.clone().strings("tokenizer.ggml.merges", &["ab abab"])).contains("merge 0"));
    assert!(message(&t.clone().strings("tokenizer.ggml.merges", &["ab"])).contains("merge 0"));
    let no_bos =
        t.clone().bool("tokenizer.ggml.add_bos_token", true).without("tokenizer.ggml.bos_token_id");
    assert!(message(&no_bos).contains("add_bos_token"));
    for scores in [vec![1.0], vec![f32::NAN; 266]] {
        let message = message(&sentencepiece().f32s("tokenizer.ggml.scores", &scores));
        assert!(message.contains("tokenizer.ggml.scores"), "{message}");
    }
}
