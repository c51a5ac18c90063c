//! Decoding token by token.

use super::{Tokenizer, TokenizerError};

/// The replacement character, which decoders write for bytes that are no UTF-8 (yet).
const REPLACEMENT: char = '\u{FFFD}';
/// A character has at most this many bytes, each at most one token.
const LONGEST_CHARACTER: usize = 4;

/// Turns a growing sequence of ids into text, holding back what a later token may still complete. A character once given
/// out stays, also where bytes behind it are no UTF-8 and decoding the whole would replace all of them.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids that the next text depends on: those of the last piece given out, for the decoder's treatment of leading
    /// spaces, then those not given out yet.
    window: Vec<u32>,
    /// How many of `window` belong to the last piece.
    settled: usize,
    /// The text of these.
    piece: String,
    /// Bytes of the text behind `piece` that were given out.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), settled: 0, piece: String::new(), given: 0 }
    }

    /// Adds a token; returns the text that is now certain, `None` if there is none.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] if decoding fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        self.window.push(id);
        let text = self.pending()?;
        let mut certain = text.trim_end_matches(REPLACEMENT).len();
        if text[certain..].chars().count() > LONGEST_CHARACTER {
            // No character is that long: these bytes are no UTF-8 and stay so.
            certain = text.len();
        }
        let piece = text.get(self.given..certain).filter(|p| !p.is_empty()).map(str::to_owned);
        if piece.is_some() && certain == text.len() {
            self.window.drain(..self.settled);
            self.settled = self.window.len();
            self.piece = self.tokenizer.decode(&self.window, true)?;
            self.given = 0;
        } else {
            self.given = self.given.max(certain);
        }
        Ok(piece)
    }

    /// Ends the sequence: what was held back is given out as it is, and the stream is empty again.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] if decoding fails.
    pub fn flush(&mut self) -> Result<Option<String>, TokenizerError> {
        let text = self.pending()?;
        let rest = text.get(self.given..).map(str::to_owned);
        *self = Self::new(self.tokenizer);
        Ok(rest.filter(|r| !r.is_empty()))
    }

    /// The text behind the last piece.
    fn pending(&self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.window, true)?;
        match text.strip_prefix(&self.piece) {
            Some(rest) => Ok(rest.to_owned()),
            // Tokens of single bytes are decoded together: an incomplete character makes those before it unreadable, too.
            None => self.tokenizer.decode(&self.window[self.settled..], true),
        }
    }
}
