//! What the tiles of both compute modes share: their heights and where they write.

use super::STRIP;
use crate::arch::Isa;

/// Tokens that the kernel of a tile may be compiled for, tallest first, down to one.
type Heights = &'static [usize];

/// How many tokens are cut into tiles: as few as possible, and these of about the same height.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiling {
    heights: Heights,
    /// Number of tiles.
    len: usize,
    /// Tokens of the first tiles; the others have one fewer.
    rows: usize,
    /// Tiles with `rows` tokens.
    full: usize,
}

/// One tile of a [`Tiling`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// First token.
    pub(crate) first: usize,
    /// Tokens.
    pub(crate) tokens: usize,
    /// Tokens that the tile computes, some of them perhaps for nothing.
    pub(crate) height: usize,
    /// Where its tokens are stored: tokens, with the room that earlier tiles have, before it.
    pub(crate) place: usize,
}

impl Tiling {
    /// Tiles in f32, as high as [`Simd::TALLEST`].
    ///
    /// [`Simd::TALLEST`]: crate::arch::Simd::TALLEST
    pub(crate) fn float(isa: Isa, tokens: usize) -> Self {
        let heights: Heights = match isa {
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => &[12, 8, 4, 2, 1],
            Isa::Scalar => &[1],
            _ => &[4, 2, 1],
        };
        Self::new(heights, tokens)
    }

    /// Tiles in int8, of any height up to [`Simd::INT8_TALLEST`].
    ///
    /// [`Simd::INT8_TALLEST`]: crate::arch::Simd::INT8_TALLEST
    pub(crate) fn int8(isa: Isa, tokens: usize) -> Self {
        let heights: Heights = match isa {
            Isa::Avx512Vnni | Isa::Avx512Bf16 => &[6, 5, 4, 3, 2, 1],
            Isa::Scalar => &[1],
            _ => &[4, 3, 2, 1],
        };
        Self::new(heights, tokens)
    }

    fn new(heights: Heights, tokens: usize) -> Self {
        let len = tokens.div_ceil(heights[0]);
        let rows = tokens.div_ceil(len.max(1)).max(1);
        Self { heights, len, rows, full: tokens - len * (rows - 1) }
    }

    /// Number of tiles.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Tokens of all tiles, with the room that they have.
    pub(crate) fn room(&self) -> usize {
        self.len * self.holding(self.rows)
    }

    pub(crate) fn tile(&self, index: usize) -> Rows {
        let tokens = if index < self.full { self.rows } else { self.rows - 1 };
        let first = index * tokens + index.min(self.full) * (self.rows - tokens);
        Rows { first, tokens, height: self.holding(tokens), place: index * self.holding(self.rows) }
    }

    /// The smallest height that holds so many tokens.
    fn holding(&self, rows: usize) -> usize {
        self.heights.iter().copied().rfind(|&h| h >= rows).unwrap_or(self.heights[0])
    }
}

/// Where a tile writes: some rows of the columns of one strip.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a> {
    /// First row, first column.
    pub(crate) ptr: *mut f32,
    /// Distance between rows.
    pub(crate) stride: usize,
    /// Rows to write, at most those computed.
    pub(crate) rows: usize,
    /// Columns to write, at most those of a strip.
    pub(crate) columns: usize,
    /// Added to each row, `[columns]`.
    pub(crate) bias: Option<&'a [f32]>,
}

/// Results under construction, `[token][output]`.
#[repr(align(64))]
pub(super) struct Sums<const MT: usize>(pub(super) [[f32; STRIP]; MT]);

impl Out<'_> {
    /// Writes the results, plus the bias.
    ///
    /// # Safety
    /// `ptr` must be valid for `rows` rows of `columns` elements at this stride, which nobody else
    /// may touch.
    #[inline(always)]
    pub(super) unsafe fn write(&self, sums: &mut [[f32; STRIP]]) {
        for (i, sums) in sums.iter_mut().enumerate().take(self.rows) {
            if let Some(bias) = self.bias {
                sums.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
            let row = self.ptr.add(i * self.stride);
            std::ptr::copy_nonoverlapping(sums.as_ptr(), row, self.columns);
        }
    }
}
