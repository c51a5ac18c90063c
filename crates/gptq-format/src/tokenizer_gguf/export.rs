//! The metadata that describe a tokenizer, read off its tokenizer.json. What llama.cpp would do otherwise than the tokenizer
//! is refused: other tokens are another model.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::{Value, json};

use super::{bytelevel, sentencepiece};
use crate::gguf::{GgufArray, GgufValue};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Why there are no metadata.
pub(crate) enum ExportError {
    /// The tokenizer failed.
    Tokenizer(TokenizerError),
    /// What cannot be expressed.
    Reason(String),
}

impl From<String> for ExportError {
    fn from(reason: String) -> Self {
        Self::Reason(reason)
    }
}

impl From<TokenizerError> for ExportError {
    fn from(error: TokenizerError) -> Self {
        Self::Tokenizer(error)
    }
}

type Result<T> = std::result::Result<T, ExportError>;

/// Values of `tokenizer.ggml.token_type`, as ggml numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A tokenizer as a GGUF file describes it.
#[derive(Debug)]
pub struct GgufTokenizer {
    /// Keys and values.
    pub metadata: Vec<(String, GgufValue)>,
    /// Where llama.cpp gives other tokens nevertheless.
    pub differs: Option<&'static str>,
}

/// The metadata, in the order in which llama.cpp's converter writes them. `json` is the tokenizer.json of `tokenizer`.
pub(crate) fn metadata(
    tokenizer: &Tokenizer,
    json: &Value,
    rows: usize,
    ends: &[u32],
) -> Result<GgufTokenizer> {
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(
            format!("its model is of type {}, and only BPE is supported", model["type"]).into()
        );
    }
    for key in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        if !matches!(&model[key], Value::Null) && model[key] != "" {
            return Err(format!("its BPE model has `{key}` = {}", model[key]).into());
        }
    }
    let vocabulary = Vocabulary::read(json, rows)?;
    let merges = merges(model)?;
    let (mut out, mut differs) = (Vec::<(String, GgufValue)>::new(), None);
    let mut set = |key: &str, value: GgufValue| out.push((format!("tokenizer.{key}"), value));
    let text = |text: &str| GgufValue::String(text.to_owned());
    let strings = |texts| GgufValue::Array(GgufArray::String(texts));

    if model["byte_fallback"] == true {
        let prefix;
        (prefix, differs) = space_prefix(json)?;
        let scores = scores(&vocabulary, &merges)?;
        set("ggml.model", text("llama"));
        set("ggml.pre", text("default"));
        set("ggml.tokens", strings(vocabulary.tokens));
        set("ggml.scores", GgufValue::Array(GgufArray::F32(scores)));
        set("ggml.token_type", GgufValue::Array(GgufArray::I32(vocabulary.types)));
        set("ggml.add_space_prefix", GgufValue::Bool(prefix));
    } else {
        let nfc = match &json["normalizer"] {
            Value::Null => false,
            normalizer if *normalizer == json!({"type": "NFC"}) => true,
            other => return Err(format!("its normalizer is {}", shorten(other)).into()),
        };
        let pre_tokenizer = &json["pre_tokenizer"];
        let ignore_merges = model["ignore_merges"] == true;
        let name = bytelevel::name_of(pre_tokenizer, nfc, ignore_merges).ok_or_else(|| {
            format!(
                "llama.cpp's name for its pre-tokenizer is not certain ({}{}{})",
                shorten(pre_tokenizer),
                if nfc { ", with NFC" } else { "" },
                if ignore_merges { ", with ignore_merges" } else { "" },
            )
        })?;
        let merges = merges.into_iter().map(|[a, b]| format!("{a} {b}")).collect();
        set("ggml.model", text("gpt2"));
        set("ggml.pre", text(name));
        set("ggml.tokens", strings(vocabulary.tokens));
        set("ggml.token_type", GgufValue::Array(GgufArray::I32(vocabulary.types)));
        set("ggml.merges", strings(merges));
    }

    let [adds_bos, adds_eos] = ends_added(tokenizer)?;
    let mut turn_ends = ends.iter().copied().filter(|&id| Some(id) != tokenizer.eos_id());
    for (name, id) in [
        ("bos", tokenizer.bos_id()),
        ("eos", tokenizer.eos_id()),
        ("unknown", tokenizer.unk_id()),
        ("padding", tokenizer.pad_id()),
        ("eot", turn_ends.next()),
        ("eom", turn_ends.next()),
    ] {
        if let Some(id) = id.filter(|&id| (id as usize) < rows) {
            set(&format!("ggml.{name}_token_id"), GgufValue::Uint(u64::from(id)));
        }
    }
    set("ggml.add_bos_token", GgufValue::Bool(adds_bos));
    set("ggml.add_eos_token", GgufValue::Bool(adds_eos));
    if let Some(template) = tokenizer.chat_template() {
        set("chat_template", text(template.source()));
    }
    Ok(GgufTokenizer { metadata: out, differs })
}

/// One token and its type for every row of the embedding.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn read(json: &Value, rows: usize) -> Result<Self> {
        let mut tokens: Vec<Option<(String, i32)>> = vec![None; rows];
        let mut put = |id: &Value, token: &str, kind: i32| -> Result<()> {
            let slot = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
            let slot = slot.ok_or_else(|| {
                format!(
                    "token {token:?} has the id {id}, but the model has {rows} token embeddings"
                )
            })?;
            *slot = Some((token.to_owned(), kind));
            Ok(())
        };
        let model = &json["model"];
        let bytes = model["byte_fallback"] == true;
        for (token, id) in model["vocab"].as_object().into_iter().flatten() {
            let kind = match token.as_str() {
                t if bytes && is_byte(t) => BYTE,
                t if model["unk_token"] == t => UNKNOWN,
                _ => NORMAL,
            };
            put(id, token, kind)?;
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let content = token["content"].as_str().unwrap_or_default();
            let kind = match (model["unk_token"] == content, token["special"] == true) {
                (true, _) => UNKNOWN,
                (_, true) => CONTROL,
                _ => USER_DEFINED,
            };
            put(&token["id"], content, kind)?;
        }
        let (tokens, types) = tokens
            .into_iter()
            .enumerate()
            .map(|(id, slot)| slot.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
            .unzip();
        Ok(Self { tokens, types })
    }
}

/// Whether a token stands for one byte: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}

/// Older files spell a merge as one text with a space.
fn merges(model: &Value) -> Result<Vec<[String; 2]>> {
    let merge = |value: &Value| match value {
        Value::String(line) => line.split_once(' ').map(|(a, b)| [a.to_owned(), b.to_owned()]),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some([a.clone(), b.clone()]),
            _ => None,
        },
        _ => None,
    };
    let list = model["merges"].as_array().map(Vec::as_slice).unwrap_or_default();
    let read = list.iter().enumerate().map(|(rank, value)| {
        let pair = merge(value).ok_or_else(|| format!("merge {rank} is {}", shorten(value)))?;
        // GGUF puts a space between the two.
        if pair.iter().any(|part| part.contains(' ')) {
            return Err(format!("merge {rank} has a space in it: {}", shorten(value)));
        }
        Ok(pair)
    });
    Ok(read.collect::<std::result::Result<_, _>>()?)
}

/// Whether a SentencePiece-like tokenizer puts a space before the text, and where llama.cpp, which puts one before every
/// text between special tokens, does otherwise.
fn space_prefix(json: &Value) -> Result<(bool, Option<&'static str>)> {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
    let normalizers = match &json["normalizer"] {
        Value::Null => Vec::new(),
        n if n["type"] == "Sequence" => n["normalizers"].as_array().cloned().unwrap_or_default(),
        n => vec![n.clone()],
    };
    let pre = &json["pre_tokenizer"];
    match (normalizers.as_slice(), pre) {
        ([first, second], Value::Null) if *first == prepend && *second == replace => Ok((true, None)),
        ([only], Value::Null) if *only == replace => Ok((false, None)),
        ([], pre) if pre["type"] == "Metaspace" && pre["replacement"] == "\u{2581}" && pre["split"] == false => {
            Ok(match pre["prepend_scheme"].as_str() {
                Some("never") => (false, None),
                Some("first") => (
                    true,
                    Some(
                        "llama.cpp puts a space also behind special tokens and before a text that begins with one, its \
                         tokenizer does not",
                    ),
                ),
                _ => (
                    true,
                    Some("llama.cpp puts a space also before a text that begins with one, its tokenizer does not"),
                ),
            })
        }
        _ => Err(format!(
            "it is SentencePiece-like, but its normalizer ({}) or pre-tokenizer ({}) is not that of Llama 2",
            shorten(&json["normalizer"]),
            shorten(pre)
        )
        .into()),
    }
}

/// Scores that imply the merges: a token's score is minus its rank among the tokens that merges give.
///
/// SentencePiece joins two neighbours whenever the result is a token, the best-scored first. That is what the merges say
/// only if they name every cut of a token into two tokens, and all cuts of a token one after another; both are checked.
fn scores(vocabulary: &Vocabulary, merges: &[[String; 2]]) -> Result<Vec<f32>> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut last = String::new();
    for [left, right] in merges {
        let token = format!("{left}{right}");
        if token == last {
            continue;
        }
        if ranks.insert(token.clone(), ranks.len()).is_some() {
            return Err(format!(
                "its merges come back to the token {token:?}, which scores cannot say"
            )
            .into());
        }
        last = token;
    }
    // Exact in f32, and below every merged token.
    let worst = -(ranks.len() as f32);
    let scores: Vec<f32> = vocabulary
        .tokens
        .iter()
        .map(|token| ranks.get(token).map_or(worst, |&rank| -(rank as f32)))
        .collect();
    let ids = (0..).zip(&vocabulary.tokens).map(|(id, token)| (token.clone(), id)).collect();
    let implied: BTreeSet<[String; 2]> =
        sentencepiece::merges_from_scores(&vocabulary.tokens, &scores, &ids)
            .ok_or_else(|| "its tokens can be cut in too many ways".to_owned())?
            .into_iter()
            .map(|(left, right)| [left, right])
            .collect();
    let given: BTreeSet<[String; 2]> = merges.iter().cloned().collect();
    if let Some([left, right]) = given.difference(&implied).next() {
        return Err(format!("its merge of {left:?} and {right:?} does not give a token").into());
    }
    // Tokens that are matched whole before any merge never come from one.
    let whole: HashSet<&String> = vocabulary
        .tokens
        .iter()
        .zip(&vocabulary.types)
        .filter(|(_, kind)| **kind != NORMAL)
        .map(|(token, _)| token)
        .collect();
    match implied.difference(&given).find(|[a, b]| !whole.contains(&format!("{a}{b}"))) {
        None => Ok(scores),
        Some([left, right]) => Err(format!(
            "it does not merge {left:?} and {right:?} though the result is a token, which SentencePiece would"
        )
        .into()),
    }
}

/// Whether sequences begin with the BOS and end with the EOS token, found by encoding one.
fn ends_added(tokenizer: &Tokenizer) -> Result<[bool; 2]> {
    let plain = tokenizer.encode("a", false)?;
    let full = tokenizer.encode("a", true)?;
    let start = full.windows(plain.len().max(1)).position(|window| window == plain);
    let parts = start.map(|start| (&full[..start], &full[start + plain.len()..]));
    let is = |part: &[u32], id: Option<u32>| match part {
        [] => Some(false),
        [only] if Some(*only) == id => Some(true),
        _ => None,
    };
    parts
        .and_then(|(before, after)| {
            Some([is(before, tokenizer.bos_id())?, is(after, tokenizer.eos_id())?])
        })
        .ok_or_else(|| {
            format!("it adds other tokens than BOS and EOS around a text ({full:?} instead of {plain:?})")
                .into()
        })
}

fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(160) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests;
