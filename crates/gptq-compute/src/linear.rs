//! Linear layers, dense or quantized, one or several on the same input.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::arch::{Isa, Pairs, isa, pairs};
use crate::gemm::gemm_nt;
use crate::matrix::{Linear, Matrix};
use crate::pool::Pool;
use crate::quantized::{
    Activations, FloatTile, INT8_TILES, Int8Input, Int8Tiles, Out, Packing, QuantizedMatrix, STRIP,
    Tiling, pack_floats, token_floats,
};
use crate::tensor::{RawSlice, Tensor};

/// Ranges that the work is cut into, at most.
const RANGES: usize = 64;
/// Tiles of f32 tokens that one task computes: their inputs stay in the second level cache while
/// the strips pass by.
const TILES: usize = 8;
/// The same in int8.
const INT8_PIECE: usize = 24;
/// Floats of input from which on it is worth waking the threads to quantize them.
const PARALLEL: usize = 32 << 10;

/// Buffers that operations reuse between calls, and how they compute.
#[derive(Debug, Default)]
pub struct Scratch {
    activations: Activations,
    floats: Vec<f32>,
    int8: Int8Input,
}

impl Scratch {
    /// Chooses how quantized layers take their input from now on. Dense layers are computed in f32
    /// unless their weights are [rounding](crate::DenseMatrix::rounding).
    pub fn set_activations(&mut self, activations: Activations) {
        self.activations = activations;
    }

    /// How quantized layers take their input.
    pub fn activations(&self) -> Activations {
        self.activations
    }
}

/// y_i = x W_iᵀ + b_i for all layers, which share the input `x` `[tokens, in]`; outputs are resized
/// to `[tokens, out_i]`.
///
/// Quantized layers with the same input layout are computed in one parallel pass (q, k and v;
/// gate and up). The weights are never expanded to floats in memory.
///
/// # Panics
/// If an input width or a bias does not match.
#[track_caller]
pub fn linear(pool: &Pool, x: &Tensor, jobs: &mut [(&Linear, &mut Tensor)], scratch: &mut Scratch) {
    linear_on(isa(), pool, x, jobs, scratch);
}

#[track_caller]
pub(crate) fn linear_on(
    isa: Isa,
    pool: &Pool,
    x: &Tensor,
    jobs: &mut [(&Linear, &mut Tensor)],
    scratch: &mut Scratch,
) {
    let mut start = 0;
    while start < jobs.len() {
        let (first, bias) = (&jobs[start].0.weight, jobs[start].0.bias.as_deref());
        match first {
            Matrix::Dense(w) => {
                gemm_nt(pool, x, w, bias, jobs[start].1);
                start += 1;
            }
            Matrix::Quantized(w) => {
                let same = |l: &Linear| matches!(&l.weight, Matrix::Quantized(v) if v.layout() == w.layout());
                let len = jobs[start..].iter().take_while(|j| same(j.0)).take(JOBS).count();
                quantized(isa, pool, x, &mut jobs[start..start + len], scratch);
                start += len;
            }
        }
    }
}

/// Layers that one pass computes, at most.
const JOBS: usize = 4;

/// One quantized layer of a call.
struct Job<'a> {
    matrix: &'a QuantizedMatrix,
    bias: Option<&'a [f32]>,
    out: RawSlice,
    /// Its strips among those of all jobs.
    strips: Range<usize>,
}

impl Job<'_> {
    /// The elements of `rows` tokens in one strip.
    fn out(&self, strip: usize, first: usize, rows: usize) -> Out<'_> {
        let n = self.matrix.out_features();
        let column = strip * STRIP;
        let columns = STRIP.min(n - column);
        Out {
            ptr: self.out.at(first * n + column, (rows - 1) * n + columns),
            stride: n,
            rows,
            columns,
            bias: self.bias.map(|b| &b[column..column + columns]),
        }
    }
}

#[track_caller]
fn quantized(
    isa: Isa,
    pool: &Pool,
    x: &Tensor,
    jobs: &mut [(&Linear, &mut Tensor)],
    scratch: &mut Scratch,
) {
    let tokens = x.rows();
    let mut strips = 0;
    let mut list: [Option<Job<'_>>; JOBS] = [const { None }; JOBS];
    for (slot, (linear, y)) in list.iter_mut().zip(jobs.iter_mut()) {
        let Matrix::Quantized(matrix) = &linear.weight else { unreachable!("selected above") };
        let n = matrix.out_features();
        assert_eq!(x.cols(), matrix.in_features(), "input width");
        assert!(linear.bias.as_ref().is_none_or(|b| b.len() == n), "bias width");
        y.resize(tokens, n);
        *slot = Some(Job {
            matrix,
            bias: linear.bias.as_deref(),
            out: RawSlice::new(y.as_mut_slice()),
            strips: strips..strips + matrix.strips(),
        });
        strips += matrix.strips();
    }
    if tokens == 0 || strips == 0 {
        return;
    }
    let pass = Pass { isa, pool, x, jobs: &list, strips };
    match scratch.activations {
        Activations::F32 => pass.float(Packing::Exact, &mut scratch.floats),
        Activations::Bf16 => {
            let packing = match pairs(isa) {
                Some(Pairs::Bf16) => Packing::Pairs,
                Some(Pairs::Int16) => Packing::Words,
                None => Packing::Rounded,
            };
            pass.float(packing, &mut scratch.floats);
        }
        Activations::Int8 => pass.int8(&mut scratch.int8),
    }
}

/// How much of a range has been handed out, on a cache line of its own.
#[repr(align(64))]
struct Cursor(AtomicUsize);

/// Quantized layers with equal input layouts.
struct Pass<'a> {
    isa: Isa,
    pool: &'a Pool,
    x: &'a Tensor,
    jobs: &'a [Option<Job<'a>>; JOBS],
    /// Strips of all jobs.
    strips: usize,
}

impl Pass<'_> {
    /// Calls `task(job, strip, piece)` for all strips and all `pieces` of the tokens.
    fn spread(&self, pieces: usize, task: &(dyn Fn(&Job<'_>, usize, usize) + Sync)) {
        let items = self.strips * pieces;
        let threads = self.pool.threads();
        let ranges = threads.min(RANGES);
        let taken = [const { Cursor(AtomicUsize::new(0)) }; RANGES];
        // Each thread goes through a range of its own, so that it streams one long run of weights,
        // and helps with the others after that. Results do not depend on who computes what.
        self.pool.run(threads, &|own| {
            for range in (own..own + ranges).map(|r| r % ranges) {
                let (first, end) = (items * range / ranges, items * (range + 1) / ranges);
                loop {
                    let item = first + taken[range].0.fetch_add(1, Ordering::Relaxed);
                    if item >= end {
                        break;
                    }
                    let (strip, piece) = (item / pieces, item % pieces);
                    // The ranges of the jobs cover all strips.
                    let job = self.jobs.iter().flatten().find(|j| j.strips.contains(&strip));
                    if let Some(job) = job {
                        task(job, strip - job.strips.start, piece);
                    }
                }
            }
        });
    }

    fn float(&self, packing: Packing, buffer: &mut Vec<f32>) {
        let Some(Job { matrix: first, .. }) = &self.jobs[0] else { return };
        let (isa, x, tokens) = (self.isa, self.x, self.x.rows());
        let tiling = Tiling::float(isa, tokens);
        let tiles = tiling.len();
        let layout = first.layout();
        let token_len = token_floats(layout, packing);
        let matrices = || self.jobs.iter().flatten().map(|j| j.matrix);
        // A single token needs no packing unless its inputs move or are summed for offsets.
        let plain = tokens == 1 && packing == Packing::Exact;
        let packed = if plain && matrices().all(QuantizedMatrix::reads_plain_input) {
            x.as_slice()
        } else {
            let size = tiling.room() * token_len;
            if buffer.len() < size {
                buffer.resize(size, 0.0);
            }
            let raw = RawSlice::new(buffer);
            let sums = matrices().any(QuantizedMatrix::needs_sums);
            self.pool.run(tiles, &|index| {
                let rows = tiling.tile(index);
                // SAFETY: tiles occupy disjoint ranges.
                let out = unsafe { raw.range(rows.place * token_len, rows.height * token_len) };
                pack_floats(isa, layout, x, rows, packing, sums, out);
            });
            buffer
        };
        self.spread(tiles.div_ceil(TILES), &|job, strip, piece| {
            for index in piece * TILES..((piece + 1) * TILES).min(tiles) {
                let rows = tiling.tile(index);
                let (x, height) = (&packed[rows.place * token_len..], rows.height);
                let out = job.out(strip, rows.first, rows.tokens);
                // SAFETY: the elements of this strip and these rows belong to this task alone.
                unsafe {
                    FloatTile { matrix: job.matrix, strip, x, packing, height, out }.run(isa);
                };
            }
        });
    }

    fn int8(&self, input: &mut Int8Input) {
        let Some(Job { matrix: first, .. }) = &self.jobs[0] else { return };
        let (isa, tokens) = (self.isa, self.x.rows());
        let parallel = tokens > 1 && tokens * self.x.cols() >= PARALLEL;
        input.fill(isa, parallel.then_some(self.pool), first.layout(), self.x);
        let input = &*input;
        let tiling = input.tiling();
        let tiles = tiling.len();
        self.spread(tiles.div_ceil(INT8_PIECE), &|job, strip, piece| {
            let end = ((piece + 1) * INT8_PIECE).min(tiles);
            for start in (piece * INT8_PIECE..end).step_by(INT8_TILES) {
                let tiles = start..(start + INT8_TILES).min(end);
                let (first, last) = (tiling.tile(tiles.start), tiling.tile(tiles.end - 1));
                let out = job.out(strip, first.first, last.first + last.tokens - first.first);
                // SAFETY: the elements of this strip and these rows belong to this task alone.
                unsafe { Int8Tiles { matrix: job.matrix, strip, x: input, tiles, out }.run(isa) };
            }
        });
    }
}
