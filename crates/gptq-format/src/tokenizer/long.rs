//! Long text in parts, so that the tokenizer's tables, some hundred bytes a token, stay small.
//!
//! A tokenizer looks at a text as a whole, and may split it anywhere. So parts are cut not where a rule says that tokens
//! end, which holds for some kinds of tokenizers only, but where it is seen: neighbouring pieces overlap, and a part ends
//! in the middle of an overlap if both pieces have the same tokens there. If they do not, the piece is made longer.

use super::{Tokenizer, TokenizerError};

/// Bytes that are encoded at once.
const PIECE: usize = 256 << 10;
/// Bytes that two pieces share.
const OVERLAP: usize = 8 << 10;
/// Tokens on either side of a seam that both pieces must agree on.
const AGREED: usize = 16;

/// What [`Tokenizer::encode_long`] returns.
pub struct Parts<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a str,
    sizes: Sizes,
    /// The piece that tokens are taken from, and the first that was not.
    piece: Piece,
    next: usize,
    done: bool,
}

#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) piece: usize,
    pub(super) overlap: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { piece: PIECE, overlap: OVERLAP }
    }
}

/// The tokens of `start..end` of the text.
#[derive(Default)]
struct Piece {
    start: usize,
    end: usize,
    /// Where each token begins in the text, and its id.
    tokens: Vec<(usize, u32)>,
}

impl Piece {
    /// The tokens around `place`, and the index of the first that begins behind it.
    fn around(&self, place: usize) -> Option<(&[(usize, u32)], usize)> {
        let index = self.tokens.partition_point(|&(start, _)| start < place);
        let tokens = self.tokens.get(index.checked_sub(AGREED)?..index + AGREED)?;
        Some((tokens, index))
    }
}

impl<'a> Parts<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, text: &'a str, sizes: Sizes) -> Self {
        Self { tokenizer, text, sizes, piece: Piece::default(), next: 0, done: false }
    }

    fn encode(&self, start: usize, len: usize) -> Result<Piece, TokenizerError> {
        let boundary = |mut at: usize| {
            while !self.text.is_char_boundary(at) {
                at += 1;
            }
            at
        };
        let start = boundary(start);
        let end = boundary((start + len).min(self.text.len()));
        let part = &self.text[start..end];
        let encoding =
            self.tokenizer.inner.encode(part, false).map_err(|e| self.tokenizer.failed(&*e))?;
        let starts = encoding.get_offsets().iter().map(|&(from, _)| start + from);
        let tokens = starts.zip(encoding.get_ids().iter().copied()).collect();
        Ok(Piece { start, end, tokens })
    }

    fn part(&mut self) -> Result<Vec<u32>, TokenizerError> {
        if self.piece.end == 0 {
            self.piece = self.encode(0, self.sizes.piece)?;
        }
        loop {
            let ids = |tokens: &[(usize, u32)]| tokens.iter().map(|&(_, id)| id).collect();
            if self.piece.end == self.text.len() {
                self.done = true;
                return Ok(ids(&self.piece.tokens[self.next..]));
            }
            let right = self.encode(self.piece.end - self.sizes.overlap, self.sizes.piece)?;
            let middle = usize::midpoint(right.start, self.piece.end);
            let seam = self.piece.around(middle).zip(right.around(middle));
            if let Some(((ours, end), (theirs, next))) = seam
                && ours == theirs
            {
                let part = ids(&self.piece.tokens[self.next..end]);
                (self.piece, self.next) = (right, next);
                return Ok(part);
            }
            // The tokens up to `next` stay what they are: they agreed before.
            let Piece { start, end, .. } = self.piece;
            let longer = self.encode(start, 2 * (end - start))?;
            self.piece = longer;
        }
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Vec<u32>, TokenizerError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done || self.text.is_empty() {
            return None;
        }
        let part = self.part();
        self.done |= part.is_err();
        Some(part)
    }
}
