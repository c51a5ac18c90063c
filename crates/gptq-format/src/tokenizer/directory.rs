//! The tokenizer of a checkpoint directory.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{Source, Tokenizer, TokenizerError};
use crate::chat::ChatTemplate;
use crate::error::FormatError;
use crate::fs::{MAX_JSON_BYTES, read_json_if_exists, read_limited};

/// Everything that belongs to a tokenizer in a checkpoint directory.
const FILES: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// The special tokens that chat templates may use.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

pub(super) fn load(directory: &Path) -> Result<Tokenizer, TokenizerError> {
    let path = directory.join("tokenizer.json");
    if !path.exists() {
        let hint = if directory.join("tokenizer.model").exists()
            || directory.join("vocab.json").exists()
        {
            "it has only the slow tokenizer's files: convert them with transformers, \
             AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        } else {
            "copy it from the model that this checkpoint was made from"
        };
        return Err(TokenizerError::Missing { directory: directory.into(), hint });
    }
    let invalid = |reason: String| TokenizerError::Invalid { path: path.clone(), reason };
    let bytes = read_limited(&path, MAX_JSON_BYTES)?;
    // The library indexes out of bounds on some malformed files, such as a merge longer than every token.
    let mut inner = catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes))
        .map_err(|_| invalid("the tokenizers library cannot take it".into()))?
        .map_err(|e| invalid(e.to_string()))?;
    // Settings of a training run; transformers resets them for every call, too.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|e| invalid(e.to_string()))?;

    let config = object(directory, "tokenizer_config.json")?;
    let map = object(directory, "special_tokens_map.json")?;
    let specials: BTreeMap<String, String> = ROLES
        .iter()
        .filter_map(|role| {
            let token = text(config.get(*role)).or_else(|| text(map.get(*role)))?;
            Some(((*role).to_owned(), token.to_owned()))
        })
        .collect();
    add_missing(&mut inner, &config, &specials).map_err(|e| invalid(e.to_string()))?;

    let chat = chat_source(directory, &config)?
        .map(|(name, source)| ChatTemplate::new(name, &source, specials.clone()));
    Ok(Tokenizer { inner, specials, chat, path: directory.into(), source: Source::Directory })
}

/// Copies the tokenizer's files that exist.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), TokenizerError> {
    // Copying a file onto itself would empty it.
    if let (Ok(a), Ok(b)) = (from.canonicalize(), to.canonicalize())
        && a == b
    {
        return Ok(());
    }
    for name in FILES {
        let source = from.join(name);
        if source.exists() {
            let target = to.join(name);
            fs::copy(&source, &target)
                .and_then(|_| fs::File::open(&target)?.sync_all())
                .map_err(FormatError::io("copy to", &target))?;
        }
    }
    Ok(())
}

/// A JSON object, empty if there is no such file.
fn object(directory: &Path, name: &str) -> Result<Map<String, Value>, TokenizerError> {
    let path = directory.join(name);
    match read_json_if_exists(&path)? {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(_) => Err(TokenizerError::Invalid { path, reason: "expected a JSON object".into() }),
    }
}

/// A token given as text or as an object with `content`.
fn text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(text) => Some(text),
        Value::Object(token) => token.get("content")?.as_str(),
        _ => None,
    }
}

/// Adds, as transformers does on loading, the tokens that tokenizer_config.json has and tokenizer.json has not: first
/// `added_tokens_decoder` by id, then the special tokens.
fn add_missing(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    specials: &BTreeMap<String, String>,
) -> tokenizers::Result<()> {
    let mut listed: Vec<(u64, AddedToken)> = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| {
            Some((id.parse().ok()?, serde_json::from_value(token.clone()).ok()?))
        })
        .collect();
    listed.sort_by_key(|(id, _)| *id);
    let more = config
        .get("additional_special_tokens")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|token| text(Some(token)));
    let special = ROLES
        .iter()
        .filter_map(|role| specials.get(*role).map(String::as_str))
        .chain(more)
        .map(|token| AddedToken::from(token, true));
    let mut known: HashSet<String> =
        inner.get_added_vocabulary().get_vocab().keys().cloned().collect();
    let missing: Vec<AddedToken> = listed
        .into_iter()
        .map(|(_, token)| token)
        .chain(special)
        .filter(|token| known.insert(token.content.clone()))
        .collect();
    // All at once: each call builds what searches for all of them.
    inner.add_tokens(missing)?;
    Ok(())
}

/// Name and source of the chat template: `chat_template.jinja`, or `chat_template` in tokenizer_config.json, which is a text
/// or a list of named ones with a `default`.
fn chat_source(
    directory: &Path,
    config: &Map<String, Value>,
) -> Result<Option<(&'static str, String)>, TokenizerError> {
    let path = directory.join("chat_template.jinja");
    if path.exists() {
        let bytes = read_limited(&path, MAX_JSON_BYTES)?;
        let source = String::from_utf8(bytes)
            .map_err(|e| TokenizerError::Invalid { path, reason: e.to_string() })?;
        return Ok(Some(("chat_template.jinja", source)));
    }
    let source = match config.get("chat_template") {
        Some(Value::String(source)) => Some(source.as_str()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")?.as_str()),
        _ => None,
    };
    Ok(source.map(|s| ("tokenizer_config.json", s.to_owned())))
}
