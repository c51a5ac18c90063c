//! The tokenizer that a GGUF file describes in its metadata, rebuilt as the `tokenizers` library would load it; and the
//! metadata for a tokenizer.

mod bytelevel;
mod export;
mod sentencepiece;

pub use export::GgufTokenizer;
pub(crate) use export::{ExportError, metadata};

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, PostProcessorWrapper};

use crate::gguf::{GgufArray, GgufFile, GgufValue};
use crate::tokenizer::TokenizerError;

/// What a rebuilt tokenizer consists of.
pub(crate) struct Rebuilt {
    /// The tokenizer itself.
    pub(crate) tokenizer: tokenizers::Tokenizer,
    /// Role (`bos_token`, ...) to text.
    pub(crate) specials: BTreeMap<String, String>,
    /// `tokenizer_config.json`.
    pub(crate) config: Map<String, Value>,
}

/// What `tokenizer.ggml.token_type` says of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Unknown,
    Control,
    UserDefined,
    /// Normal, unused and byte tokens: the model's own.
    Other,
}

/// The vocabulary in metadata.
struct Vocabulary<'a> {
    tokens: &'a [String],
    kinds: Vec<Kind>,
}

pub(crate) fn rebuild(gguf: &GgufFile) -> Result<Rebuilt, TokenizerError> {
    let vocabulary = Vocabulary::read(gguf)?;
    let key = "tokenizer.ggml.model";
    let model = gguf.required(key, gguf.str(key)?)?;
    // llama.cpp's defaults where the keys are absent.
    let (mut tokenizer, add_bos, default_ids) = match model {
        "gpt2" => {
            let (tokenizer, add_bos) = bytelevel::build(gguf, &vocabulary)?;
            (tokenizer, add_bos, [None; 3])
        }
        "llama" => {
            let tokenizer = sentencepiece::build(gguf, &vocabulary)?;
            (tokenizer, true, [Some(1), Some(2), Some(0)])
        }
        other => {
            return Err(TokenizerError::Unsupported {
                path: gguf.path().into(),
                key,
                value: other.into(),
                supported: "gpt2, llama".into(),
            });
        }
    };
    let invalid = |reason: String| TokenizerError::Invalid { path: gguf.path().into(), reason };
    tokenizer.add_tokens(vocabulary.added_tokens()).map_err(|e| invalid(e.to_string()))?;

    let mut ids = BTreeMap::new();
    for (role, name, default) in [
        ("bos_token", "bos", default_ids[0]),
        ("eos_token", "eos", default_ids[1]),
        ("unk_token", "unknown", default_ids[2]),
        ("pad_token", "padding", None),
    ] {
        let default = default.filter(|&id| (id as usize) < vocabulary.tokens.len());
        if let Some(id) = gguf.token_id(name)?.or(default) {
            ids.insert(role, id);
        }
    }
    let text = |id: u32| vocabulary.tokens[id as usize].as_str();
    let flag =
        |key: &str, default: bool| Ok::<_, TokenizerError>(gguf.bool(key)?.unwrap_or(default));
    let bos = flag("tokenizer.ggml.add_bos_token", add_bos)?.then(|| ids.get("bos_token"));
    let eos = flag("tokenizer.ggml.add_eos_token", false)?.then(|| ids.get("eos_token"));
    let ends = [("bos", bos), ("eos", eos)].map(|(name, id)| match id {
        Some(None) => Err(invalid(format!(
            "tokenizer.ggml.add_{name}_token is set, but there is no tokenizer.ggml.{name}_token_id"
        ))),
        Some(Some(&id)) => Ok(Some((text(id), id))),
        None => Ok(None),
    });
    let [bos, eos] = ends;
    let post_processor = template(bos?, eos?).map_err(|e| invalid(e.to_string()))?;
    tokenizer.with_post_processor(post_processor);

    let specials: BTreeMap<String, String> =
        ids.iter().map(|(role, &id)| ((*role).to_owned(), text(id).to_owned())).collect();
    let config = config(gguf, &tokenizer, &specials);
    Ok(Rebuilt { tokenizer, specials, config })
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a GgufFile) -> Result<Self, TokenizerError> {
        let key = "tokenizer.ggml.tokens";
        let tokens = gguf.required(key, gguf.strings(key)?)?;
        let key = "tokenizer.ggml.token_type";
        let types = match gguf.value(key) {
            None => vec![1; tokens.len()],
            Some(GgufValue::Array(GgufArray::I32(types))) => types.clone(),
            Some(GgufValue::Array(GgufArray::U32(types))) => {
                types.iter().map(|&t| t.try_into().unwrap_or(0)).collect()
            }
            Some(_) => return Err(gguf.bad_value(key, "an array of integers").into()),
        };
        if types.len() != tokens.len() {
            let expected = format!("an array of {} values, one per token", tokens.len());
            return Err(gguf.bad_value(key, expected).into());
        }
        let kinds = types
            .into_iter()
            .map(|t| match t {
                2 => Kind::Unknown,
                3 => Kind::Control,
                4 => Kind::UserDefined,
                _ => Kind::Other,
            })
            .collect();
        Ok(Self { tokens, kinds })
    }

    /// Tokens that are matched whole in the text, before the model sees it.
    fn added_tokens(&self) -> impl Iterator<Item = AddedToken> {
        self.tokens.iter().zip(&self.kinds).filter(|(_, kind)| **kind != Kind::Other).map(
            |(token, kind)| {
                AddedToken::from(token.as_str(), *kind != Kind::UserDefined).normalized(false)
            },
        )
    }
}

/// Text and id.
type Special<'a> = (&'a str, u32);

/// The post-processor that puts `bos` before and `eos` after a sequence.
fn template(
    bos: Option<Special<'_>>,
    eos: Option<Special<'_>>,
) -> serde_json::Result<Option<PostProcessorWrapper>> {
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let piece = |special: Option<Special<'_>>, sequence: u32| {
        special.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": sequence}}))
    };
    let sequence = |name: &str, id: u32| {
        [piece(bos, id), Some(json!({"Sequence": {"id": name, "type_id": id}})), piece(eos, id)]
    };
    let single: Vec<Value> = sequence("A", 0).into_iter().flatten().collect();
    let pair: Vec<Value> =
        [sequence("A", 0), sequence("B", 1)].into_iter().flatten().flatten().collect();
    let special_tokens: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    serde_json::from_value(json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special_tokens,
    }))
    .map(Some)
}

/// The `tokenizer_config.json` with which transformers opens the rebuilt tokenizer.
fn config(
    gguf: &GgufFile,
    tokenizer: &tokenizers::Tokenizer,
    specials: &BTreeMap<String, String>,
) -> Map<String, Value> {
    let mut added: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    added.sort_by_key(|(id, _)| *id);
    let decoder: Map<String, Value> = added
        .into_iter()
        .map(|(id, t)| {
            let fields = json!({
                "content": t.content,
                "lstrip": t.lstrip,
                "normalized": t.normalized,
                "rstrip": t.rstrip,
                "single_word": t.single_word,
                "special": t.special,
            });
            (id.to_string(), fields)
        })
        .collect();
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("added_tokens_decoder".into(), Value::Object(decoder));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    for (role, token) in specials {
        config.insert(role.clone(), json!(token));
    }
    let architecture =
        gguf.value("general.architecture").and_then(GgufValue::as_str).unwrap_or_default();
    if let Some(length) =
        gguf.value(&format!("{architecture}.context_length")).and_then(GgufValue::as_u64)
    {
        config.insert("model_max_length".into(), json!(length));
    }
    if let Some(template) = gguf.value("tokenizer.chat_template").and_then(GgufValue::as_str) {
        config.insert("chat_template".into(), json!(template));
    }
    config
}

#[cfg(test)]
mod tests;
