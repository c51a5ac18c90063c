//! `tokenizer.ggml.model` = `gpt2`: byte-level BPE with a named pre-tokenizer.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::Vocabulary;
use crate::gguf::GgufFile;
use crate::tokenizer::TokenizerError;

/// How text is cut into words before the merges apply, under a name of `tokenizer.ggml.pre`.
struct Pre {
    /// The first is the one that is written.
    names: &'static [&'static str],
    cut: Cut,
    /// Text is brought into Unicode normal form C first.
    nfc: bool,
    /// A word that is a token is that token, whatever the merges say.
    ignore_merges: bool,
    /// A sequence begins with BOS unless `add_bos_token` says otherwise.
    add_bos: bool,
}

enum Cut {
    /// GPT-2's expression.
    Gpt2,
    /// Every digit by itself, then GPT-2's expression.
    DigitsGpt2,
    /// Another expression.
    Regex(&'static str),
}

// The expressions of the tokenizer.json files of the models that gave the names.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PRE_TOKENIZERS: [Pre; 7] = [
    Pre {
        names: &["gpt-2", "default", "phi-2", "olmo", "mpt"],
        cut: Cut::Gpt2,
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact"],
        cut: Cut::DigitsGpt2,
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        cut: Cut::Regex(LLAMA3),
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    Pre {
        names: &["smaug-bpe"],
        cut: Cut::Regex(LLAMA3),
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["qwen2"],
        cut: Cut::Regex(QWEN2),
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["deepseek-r1-qwen"],
        cut: Cut::Regex(QWEN2),
        nfc: false,
        ignore_merges: false,
        add_bos: true,
    },
    Pre {
        names: &["tekken"],
        cut: Cut::Regex(TEKKEN),
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
];

/// The tokenizer, and whether it begins sequences with BOS by default.
pub(super) fn build(
    gguf: &GgufFile,
    vocabulary: &Vocabulary<'_>,
) -> Result<(tokenizers::Tokenizer, bool), TokenizerError> {
    let invalid = |reason: String| TokenizerError::Invalid { path: gguf.path().into(), reason };
    let named = gguf.str("tokenizer.ggml.pre")?;
    if named.is_none() {
        tracing::warn!(
            "{} does not say how it cuts text into words (tokenizer.ggml.pre): as GPT-2 does, which is wrong for Llama 3 and \
             others; newer files of these models say it",
            gguf.path().display()
        );
    }
    let name = named.unwrap_or("default");
    let pre = PRE_TOKENIZERS.iter().find(|p| p.names.contains(&name)).ok_or_else(|| {
        TokenizerError::Unsupported {
            path: gguf.path().into(),
            key: "tokenizer.ggml.pre",
            value: name.into(),
            supported: PRE_TOKENIZERS
                .iter()
                .flat_map(|p| p.names)
                .copied()
                .collect::<Vec<_>>()
                .join(", "),
        }
    })?;

    // Where a token occurs twice, the later id is the token's, as in a Python dict.
    let vocab: Vocab = (0..).zip(vocabulary.tokens).map(|(id, t)| (t.clone(), id)).collect();
    let key = "tokenizer.ggml.merges";
    let mut merges = Vec::new();
    for (rank, line) in gguf.required(key, gguf.strings(key)?)?.iter().enumerate() {
        // The library indexes out of bounds for a merge whose result is longer than every token, so look it up here.
        match line.split_once(' ') {
            Some((a, b)) if vocab.contains_key(&format!("{a}{b}")) => {
                merges.push((a.to_owned(), b.to_owned()));
            }
            _ => {
                return Err(invalid(format!("merge {rank} ({line:?}) does not give a token")));
            }
        }
    }
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| invalid(e.to_string()))?;

    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let part = |e: serde_json::Error| invalid(e.to_string());
    if pre.nfc {
        let nfc: NormalizerWrapper =
            serde_json::from_value(json!({"type": "NFC"})).map_err(part)?;
        tokenizer.with_normalizer(Some(nfc)).map_err(|e| invalid(e.to_string()))?;
    }
    let pre_tokenizer: PreTokenizerWrapper =
        serde_json::from_value(pre.cut.json()).map_err(part)?;
    let decoder: DecoderWrapper = serde_json::from_value(byte_level(true)).map_err(part)?;
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    tokenizer.with_decoder(Some(decoder));
    Ok((tokenizer, pre.add_bos))
}

/// The name under which llama.cpp knows the way in which a tokenizer.json cuts text, or `None` if it is none of those above.
pub(super) fn name_of(
    pre_tokenizer: &Value,
    nfc: bool,
    ignore_merges: bool,
) -> Option<&'static str> {
    let wanted = comparable(pre_tokenizer);
    let pre = PRE_TOKENIZERS.iter().find(|pre| {
        pre.nfc == nfc
            && pre.ignore_merges == ignore_merges
            && comparable(&pre.cut.json()) == wanted
    })?;
    pre.names.first().copied()
}

/// A pre-tokenizer without what does not change the tokens.
fn comparable(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            if let Some([only]) =
                map.get("pretokenizers").and_then(Value::as_array).map(Vec::as_slice)
            {
                return comparable(only);
            }
            // Offsets into the text, which nobody here uses.
            let kept = map.iter().filter(|(key, _)| *key != "trim_offsets");
            // The order of keys is no difference.
            let sorted: std::collections::BTreeMap<_, _> =
                kept.map(|(key, value)| (key.clone(), comparable(value))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(comparable).collect()),
        other => other.clone(),
    }
}

impl Cut {
    /// The pre-tokenizer as tokenizer.json spells it.
    fn json(&self) -> Value {
        let parts = match self {
            Self::Gpt2 => return byte_level(true),
            Self::DigitsGpt2 => {
                json!([{"type": "Digits", "individual_digits": true}, byte_level(true)])
            }
            Self::Regex(regex) => json!([
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]),
        };
        json!({"type": "Sequence", "pretokenizers": parts})
    }
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}
