//! `tokenizer.ggml.model` = `llama`: SentencePiece BPE with scores and byte fallback.

use serde_json::json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{DecoderWrapper, NormalizerWrapper};

use super::{Kind, Vocabulary};
use crate::gguf::{GgufArray, GgufFile, GgufValue};
use crate::tokenizer::TokenizerError;

/// Longest token whose merges are rebuilt, in bytes; SentencePiece's own limit is far below. Bounds the work, which grows
/// with the square of the length.
const MAX_TOKEN: usize = 1024;
/// Bytes of all merges over those of all tokens, at most; of published vocabularies some two or three.
const MAX_GROWTH: usize = 32;

pub(super) fn build(
    gguf: &GgufFile,
    vocabulary: &Vocabulary<'_>,
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let invalid = |reason: String| TokenizerError::Invalid { path: gguf.path().into(), reason };
    let key = "tokenizer.ggml.scores";
    let scores = match gguf.value(key) {
        Some(GgufValue::Array(GgufArray::F32(s)))
            if s.len() == vocabulary.tokens.len() && s.iter().all(|score| score.is_finite()) =>
        {
            s
        }
        _ => {
            let count = vocabulary.tokens.len();
            let expected = format!("an array of {count} finite floats, one per token");
            return Err(gguf.bad_value(key, expected).into());
        }
    };
    if let Some((id, token)) = (0..).zip(vocabulary.tokens).find(|(_, t)| t.len() > MAX_TOKEN) {
        let id: usize = id;
        return Err(invalid(format!(
            "token {id} has {} bytes, more than {MAX_TOKEN}",
            token.len()
        )));
    }
    let vocab: Vocab = (0..).zip(vocabulary.tokens).map(|(id, t)| (t.clone(), id)).collect();
    let merges = merges_from_scores(vocabulary.tokens, scores, &vocab)
        .ok_or_else(|| invalid("its tokens can be cut in too many ways".to_owned()))?;
    let mut model =
        BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true);
    let unknown = vocabulary.kinds.iter().position(|k| *k == Kind::Unknown);
    if let Some(id) = unknown {
        model = model.unk_token(vocabulary.tokens[id].clone());
    }
    let model = model.build().map_err(|e| invalid(e.to_string()))?;

    // A space is written as U+2581, and one is put before the text.
    let prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let mut normalizers = vec![];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": "\u{2581}"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(replace);
    let part = |e: serde_json::Error| invalid(e.to_string());
    let normalizer: NormalizerWrapper =
        serde_json::from_value(json!({"type": "Sequence", "normalizers": normalizers}))
            .map_err(part)?;
    let decoder: DecoderWrapper =
        serde_json::from_value(json!({"type": "Sequence", "decoders": decoders})).map_err(part)?;

    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(normalizer)).map_err(|e| invalid(e.to_string()))?;
    tokenizer.with_decoder(Some(decoder));
    Ok(tokenizer)
}

/// The merges that a SentencePiece vocabulary implies: every cut of a token into two tokens, the best-scored token first;
/// among equals the longer left part, then the longer right part, then the lower ids. It is the order in which transformers
/// rebuilds them. `None` if they are too many for any vocabulary that was made of text.
pub(super) fn merges_from_scores(
    tokens: &[String],
    scores: &[f32],
    vocab: &Vocab,
) -> Option<Vec<(String, String)>> {
    struct Merge<'a> {
        score: f32,
        left: &'a str,
        right: &'a str,
        left_chars: usize,
        right_chars: usize,
    }
    let bytes: usize = tokens.iter().map(String::len).sum();
    let mut room = MAX_GROWTH * bytes;
    let mut merges = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let chars = token.chars().count();
        let mut cuts: Vec<_> = token
            .char_indices()
            .enumerate()
            .skip(1)
            .filter_map(|(left_chars, (at, _))| {
                let (left, right) = token.split_at(at);
                let ids = (*vocab.get(left)?, *vocab.get(right)?);
                let merge =
                    Merge { score, left, right, left_chars, right_chars: chars - left_chars };
                Some((ids, merge))
            })
            .collect();
        room = room.checked_sub(cuts.len() * token.len())?;
        cuts.sort_by_key(|(ids, _)| *ids);
        merges.extend(cuts.into_iter().map(|(_, merge)| merge));
    }
    // Stable: what is equal stays in the order of ids.
    merges.sort_by(|a, b| {
        // Zeros of both signs are the same score.
        (b.score + 0.0)
            .total_cmp(&(a.score + 0.0))
            .then(b.left_chars.cmp(&a.left_chars))
            .then(b.right_chars.cmp(&a.right_chars))
    });
    Some(merges.into_iter().map(|m| (m.left.to_owned(), m.right.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_bounded_by_the_size_of_the_tokens() {
        let merges = |tokens: &[String]| {
            let vocab = (0..).zip(tokens).map(|(id, token)| (token.clone(), id)).collect();
            merges_from_scores(tokens, &vec![0.0; tokens.len()], &vocab)
        };
        let runs = |longest: usize| (1..=longest).map(|n| "a".repeat(n)).collect::<Vec<_>>();
        assert_eq!(merges(&runs(16)).map(|merges| merges.len()), Some(15 * 16 / 2));
        assert_eq!(merges(&runs(300)), None);
    }
}
