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

/// The tokens of a text, part by part: what [`Tokenizer::encode_long`] returns.
///
/// After an error, which is that of [`Tokenizer::encode`] or a tokenizer that takes words apart by what comes far behind
/// them, there is nothing more.
pub struct Parts<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a str,
    sizes: Sizes,
    /// The piece that tokens are taken from.
    piece: Piece,
    /// Where they go on.
    seam: Seam,
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

/// A token: where it begins in the text, and its id.
type Token = (usize, u32);

/// The tokens of `start..end` of the text.
#[derive(Default)]
struct Piece {
    start: usize,
    end: usize,
    tokens: Vec<Token>,
}

/// A place of the text and the tokens around it, half of them before it; none at the beginning.
#[derive(Default, PartialEq)]
struct Seam {
    place: usize,
    around: Vec<Token>,
}

impl Piece {
    /// The first token that begins at `place` or behind it.
    fn index(&self, place: usize) -> usize {
        self.tokens.partition_point(|&(start, _)| start < place)
    }

    /// A seam at `place`, if there are tokens enough.
    fn seam(&self, place: usize) -> Option<Seam> {
        if place == 0 {
            return Some(Seam::default());
        }
        let index = self.index(place);
        let around = self.tokens.get(index.checked_sub(AGREED)?..index + AGREED)?.to_vec();
        Some(Seam { place, around })
    }

    fn ids(&self, from: usize, to: usize) -> Vec<u32> {
        self.tokens[self.index(from)..self.index(to)].iter().map(|&(_, id)| id).collect()
    }
}

impl<'a> Parts<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, text: &'a str, sizes: Sizes) -> Self {
        let (piece, seam) = (Piece::default(), Seam::default());
        Self { tokenizer, text, sizes, piece, seam, done: text.is_empty() }
    }

    fn encode(&self, start: usize, len: usize) -> Result<Piece, TokenizerError> {
        let boundary = |mut at: usize| {
            while !self.text.is_char_boundary(at) {
                at += 1;
            }
            at
        };
        let start = boundary(start);
        let end = boundary(start.saturating_add(len).min(self.text.len()));
        let part = &self.text[start..end];
        let encoding =
            self.tokenizer.inner.encode(part, false).map_err(|e| self.tokenizer.failed(&*e))?;
        let starts = encoding.get_offsets().iter().map(|&(from, _)| start + from);
        let tokens = starts.zip(encoding.get_ids().iter().copied()).collect();
        Ok(Piece { start, end, tokens })
    }

    fn part(&mut self) -> Result<Vec<u32>, TokenizerError> {
        if self.text.len() <= self.sizes.piece {
            self.done = true;
            return self.tokenizer.encode(self.text, false);
        }
        if self.piece.end == 0 {
            self.piece = self.encode(0, self.sizes.piece)?;
        }
        loop {
            let Piece { start, end, .. } = self.piece;
            if end == self.text.len() {
                self.done = true;
                return Ok(self.piece.ids(self.seam.place, usize::MAX));
            }
            let right = self.encode(end - self.sizes.overlap, self.sizes.piece)?;
            let middle = usize::midpoint(right.start, end);
            if let Some(seam) = right.seam(middle)
                && self.piece.seam(middle).as_ref() == Some(&seam)
            {
                let part = self.piece.ids(self.seam.place, middle);
                (self.piece, self.seam) = (right, seam);
                return Ok(part);
            }
            let longer = self.encode(start, 2 * (end - start))?;
            if longer.seam(self.seam.place).as_ref() != Some(&self.seam) {
                let path = self.tokenizer.path.clone();
                let reason = "a text's tokens depend on what comes far behind them".to_owned();
                return Err(TokenizerError::Failed { path, reason });
            }
            self.piece = longer;
        }
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Vec<u32>, TokenizerError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let part = self.part();
        self.done |= part.is_err();
        Some(part)
    }
}
