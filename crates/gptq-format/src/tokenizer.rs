//! Text to token ids and back, from a checkpoint directory or a GGUF file.

mod directory;
mod long;
mod stream;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value};
use tokenizers::{PostProcessor, TruncationDirection};

use crate::chat::{ChatError, ChatTemplate, Message};
use crate::error::FormatError;
use crate::fs::write_atomic;
use crate::gguf::{GgufError, GgufFile};
use crate::tokenizer_gguf::{self, ExportError, GgufTokenizer};

pub use long::Parts;
pub use stream::DecodeStream;

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(Box<FormatError>),
    /// The GGUF file's metadata could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A checkpoint directory has no `tokenizer.json`.
    #[error("`{}` has no tokenizer.json; {hint}", directory.display())]
    Missing {
        /// The checkpoint directory.
        directory: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The description of the tokenizer is malformed or contradicts itself.
    #[error("`{}` does not describe a valid tokenizer: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer is of a kind that cannot be rebuilt from GGUF.
    #[error(
        "`{}` has a tokenizer with {key} = `{value}`, which is not supported; supported are {supported}",
        path.display()
    )]
    Unsupported {
        /// The GGUF file.
        path: PathBuf,
        /// The metadata key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The values that are supported, separated by commas.
        supported: String,
    },
    /// The tokenizer does what GGUF has no words for.
    #[error("the tokenizer of `{}` cannot be written as GGUF: {reason}", path.display())]
    NotGguf {
        /// Where the tokenizer came from.
        path: PathBuf,
        /// What it does.
        reason: String,
    },
    /// Text could not be encoded or ids not decoded.
    #[error("the tokenizer of `{}` failed: {reason}", path.display())]
    Failed {
        /// Where the tokenizer came from.
        path: PathBuf,
        /// The tokenizer's reason.
        reason: String,
    },
    /// There is no chat template.
    #[error("`{}` has no chat template; use a plain prompt", path.display())]
    NoChatTemplate {
        /// Where the tokenizer came from.
        path: PathBuf,
    },
    /// The chat template could not be compiled or rendered.
    #[error(transparent)]
    Chat(#[from] ChatError),
}

impl From<FormatError> for TokenizerError {
    fn from(error: FormatError) -> Self {
        Self::File(Box::new(error))
    }
}

/// A tokenizer with its special tokens and chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Role (`bos_token`, ...) to text.
    specials: BTreeMap<String, String>,
    /// A template that does not compile is kept as its error: only those who chat need it.
    chat: Option<Result<ChatTemplate, ChatError>>,
    path: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Files that are copied as they are.
    Directory,
    /// The `tokenizer_config.json` that goes with the rebuilt tokenizer.
    Rebuilt(Map<String, Value>),
}

impl Tokenizer {
    /// Loads the tokenizer of a checkpoint directory: `tokenizer.json`, with special tokens and chat template from
    /// `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` where these exist.
    ///
    /// # Errors
    /// [`TokenizerError`] if `tokenizer.json` is missing or malformed. A chat template that does not compile is reported
    /// by [`Tokenizer::apply_chat_template`].
    pub fn from_dir(directory: &Path) -> Result<Self, TokenizerError> {
        directory::load(directory)
    }

    /// Rebuilds the tokenizer that a GGUF file describes in its metadata.
    ///
    /// # Errors
    /// [`TokenizerError::Unsupported`] for a kind of tokenizer that cannot be rebuilt exactly,
    /// [`TokenizerError::Invalid`] or [`TokenizerError::Gguf`] for malformed metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self, TokenizerError> {
        let rebuilt = tokenizer_gguf::rebuild(gguf)?;
        let chat = gguf.str("tokenizer.chat_template")?.map(|source| {
            ChatTemplate::new("tokenizer.chat_template", source, rebuilt.specials.clone())
        });
        Ok(Self {
            inner: rebuilt.tokenizer,
            specials: rebuilt.specials,
            chat,
            path: gguf.path().into(),
            source: Source::Rebuilt(rebuilt.config),
        })
    }

    /// Encodes a whole text; with `add_special`, with the special tokens that begin and end a sequence.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] if the tokenizer's own model fails (a text outside its alphabet without an unknown
    /// token).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        // The fast variant leaves out character offsets, which nobody here needs.
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| self.failed(&*e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Encodes a long text in parts, whose tokens are together those of [`Tokenizer::encode`] without special tokens. Memory
    /// does not grow with the text, unless neighbouring pieces of it have no tokens in common.
    pub fn encode_long<'a>(&'a self, text: &'a str) -> Parts<'a> {
        Parts::new(self, text, long::Sizes::default())
    }

    /// Encodes a whole text with the special tokens that begin and end a sequence, `longest` tokens at most: of a longer
    /// text the end is left out, not the special tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_truncated(&self, text: &str, longest: usize) -> Result<Vec<u32>, TokenizerError> {
        let mut encoding = self.inner.encode_fast(text, false).map_err(|e| self.failed(&*e))?;
        let added =
            self.inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        encoding.truncate(longest.saturating_sub(added), 0, TruncationDirection::Right);
        let encoding =
            self.inner.post_process(encoding, None, true).map_err(|e| self.failed(&*e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes ids; ids outside the vocabulary give nothing, bytes that are no UTF-8 the replacement character.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(|e| self.failed(&*e))
    }

    /// Decodes a sequence that grows token by token, special tokens left out.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// Number of tokens, those added to the model's vocabulary included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of the token that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.special_id("bos_token")
    }

    /// Id of the token that ends a sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.special_id("eos_token")
    }

    /// Id of the token that fills a batch.
    pub fn pad_id(&self) -> Option<u32> {
        self.special_id("pad_token")
    }

    /// Id of the token for unknown text.
    pub fn unk_id(&self) -> Option<u32> {
        self.special_id("unk_token")
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token, as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The chat template, if there is one and it compiles.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()?.as_ref().ok()
    }

    /// Renders a conversation as text; encode it with `add_special` false, since templates write the special tokens. `now`
    /// is the time that a template may ask for.
    ///
    /// # Errors
    /// [`TokenizerError::NoChatTemplate`] if there is none, [`TokenizerError::Chat`] if it does not compile or render.
    pub fn apply_chat_template(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now: SystemTime,
    ) -> Result<String, TokenizerError> {
        match &self.chat {
            None => Err(TokenizerError::NoChatTemplate { path: self.path.clone() }),
            Some(Err(error)) => Err(error.clone().into()),
            Some(Ok(template)) => Ok(template.render(messages, add_generation_prompt, now)?),
        }
    }

    /// Writes the tokenizer into a checkpoint directory that transformers' `AutoTokenizer` opens: the files of the source
    /// directory as they are, or tokenizer.json and tokenizer_config.json rebuilt from GGUF.
    ///
    /// # Errors
    /// [`TokenizerError::File`] if a file cannot be read or written.
    pub fn save(&self, directory: &Path) -> Result<(), TokenizerError> {
        match &self.source {
            Source::Directory => directory::copy(&self.path, directory),
            Source::Rebuilt(config) => {
                let json = self.inner.to_string(true).map_err(|e| self.failed(&*e))?;
                write_atomic(&directory.join("tokenizer.json"), json.as_bytes())?;
                let mut config = serde_json::to_vec_pretty(config).map_err(|e| self.failed(&e))?;
                config.push(b'\n');
                write_atomic(&directory.join("tokenizer_config.json"), &config)?;
                Ok(())
            }
        }
    }

    /// Copies the tokenizer's files from one checkpoint directory to another as they are; those that do not exist are left
    /// out.
    ///
    /// # Errors
    /// [`TokenizerError::File`] if a file cannot be read or written.
    pub fn copy_files(from: &Path, to: &Path) -> Result<(), TokenizerError> {
        directory::copy(from, to)
    }

    /// The `tokenizer.*` metadata of a GGUF file for a model with `rows` token embeddings; ids without a token are filled
    /// up. `ends` are ids beside the end-of-sequence token that end a turn.
    ///
    /// # Errors
    /// [`TokenizerError::NotGguf`] if llama.cpp could not be told how the tokenizer works, so that it would give other
    /// tokens for any text.
    pub fn gguf_metadata(
        &self,
        rows: usize,
        ends: &[u32],
    ) -> Result<GgufTokenizer, TokenizerError> {
        let json = self.inner.to_string(false).map_err(|e| self.failed(&*e))?;
        let json: Value = serde_json::from_str(&json).map_err(|e| self.failed(&e))?;
        tokenizer_gguf::metadata(self, &json, rows, ends).map_err(|error| match error {
            ExportError::Tokenizer(error) => error,
            ExportError::Reason(reason) => {
                TokenizerError::NotGguf { path: self.path.clone(), reason }
            }
        })
    }

    fn special_id(&self, role: &str) -> Option<u32> {
        self.id(self.specials.get(role)?)
    }

    fn failed(&self, error: &dyn std::error::Error) -> TokenizerError {
        TokenizerError::Failed { path: self.path.clone(), reason: error.to_string() }
    }
}

#[cfg(test)]
mod tests;
