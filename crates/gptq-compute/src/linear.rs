//! Linear layers, dense or quantized, one or several on the same input.

use std::ops::Range;

use crate::arch::{Isa, isa};
use crate::gemm::gemm_nt;
use crate::matrix::{Linear, Matrix};
use crate::pool::Pool;
use crate::quantized::{Out, QuantizedMatrix, heights, pack_input, run_tile};
use crate::tensor::{RawSlice, Tensor};

/// Panels of 16 outputs that one task computes.
const PANELS: usize = 4;
/// Tiles of tokens that one task computes: the packed inputs of eight tiles stay in the second
/// level cache while the panels pass by.
const TILES: usize = 8;

/// Buffers that operations reuse between calls.
#[derive(Debug, Default)]
pub struct Scratch {
    packed: Vec<f32>,
}

/// One quantized layer of a call, with its place in the list of tasks.
struct Job<'a> {
    matrix: &'a QuantizedMatrix,
    bias: Option<&'a [f32]>,
    out: RawSlice,
    tasks: Range<usize>,
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
                let len = jobs[start..].iter().take_while(|j| same(j.0)).count();
                quantized(isa, pool, x, &mut jobs[start..start + len], scratch);
                start += len;
            }
        }
    }
}

/// Tile `index` of `tokens` rows: first row, rows, height.
fn tile(heights: &[usize], tokens: usize, index: usize) -> (usize, usize, usize) {
    let first = index * heights[0];
    let rows = heights[0].min(tokens - first);
    // The smallest height that holds the rest.
    let height = heights.iter().copied().filter(|&h| h >= rows).min().unwrap_or(heights[0]);
    (first, rows, height)
}

#[track_caller]
fn quantized(
    isa: Isa,
    pool: &Pool,
    x: &Tensor,
    jobs: &mut [(&Linear, &mut Tensor)],
    scratch: &mut Scratch,
) {
    let heights = heights(isa);
    let tokens = x.rows();
    let tiles = tokens.div_ceil(heights[0]);
    let tile_tasks = tiles.div_ceil(TILES);
    let mut list: [Option<Job<'_>>; 4] = [const { None }; 4];
    if jobs.len() > list.len() {
        let (head, tail) = jobs.split_at_mut(list.len());
        quantized(isa, pool, x, head, scratch);
        quantized(isa, pool, x, tail, scratch);
        return;
    }
    let mut tasks = 0;
    for (slot, (linear, y)) in list.iter_mut().zip(jobs.iter_mut()) {
        let Matrix::Quantized(matrix) = &linear.weight else { unreachable!("selected above") };
        let n = matrix.out_features();
        assert_eq!(x.cols(), matrix.in_features(), "input width");
        assert!(linear.bias.as_ref().is_none_or(|b| b.len() == n), "bias width");
        y.resize(tokens, n);
        let count = matrix.panels().div_ceil(PANELS) * tile_tasks;
        *slot = Some(Job {
            matrix,
            bias: linear.bias.as_deref(),
            out: RawSlice::new(y.as_mut_slice()),
            tasks: tasks..tasks + count,
        });
        tasks += count;
    }
    let Some(first) = &list[0] else { return };
    if tokens == 0 {
        return;
    }

    // A single token needs no packing unless its columns move or are summed for zero points.
    let layout = first.matrix.layout();
    let packed_len = layout.packed_len();
    let plain = tokens == 1 && list.iter().flatten().all(|j| j.matrix.reads_plain_input());
    let at = |index: usize| index * heights[0] * packed_len;
    let packed: &[f32] = if plain {
        x.as_slice()
    } else {
        let (last, _, height) = tile(heights, tokens, tiles - 1);
        let size = (last + height) * packed_len;
        if scratch.packed.len() < size {
            scratch.packed.resize(size, 0.0);
        }
        let raw = RawSlice::new(&mut scratch.packed);
        pool.run(tiles, &|index| {
            let (first, rows, height) = tile(heights, tokens, index);
            // SAFETY: tiles occupy disjoint ranges.
            let out = unsafe { raw.range(at(index), height * packed_len) };
            pack_input(layout, x, first, rows, height, out);
        });
        &scratch.packed
    };

    pool.run(tasks, &|task| {
        // The ranges of the jobs cover all tasks.
        let Some(job) = list.iter().flatten().find(|j| j.tasks.contains(&task)) else {
            return;
        };
        let local = task - job.tasks.start;
        let (chunk, tile_task) = (local / tile_tasks, local % tile_tasks);
        let n = job.matrix.out_features();
        let panels = chunk * PANELS..((chunk + 1) * PANELS).min(job.matrix.panels());
        for index in tile_task * TILES..((tile_task + 1) * TILES).min(tiles) {
            let (first, rows, height) = tile(heights, tokens, index);
            // SAFETY: the input was packed for this layout and height; the columns of these
            // panels in these rows belong to this task alone, and `out` holds tokens * n floats.
            unsafe {
                let ptr = job.out.at(first * n, rows * n);
                let out = Out { ptr, stride: n, rows, bias: job.bias };
                run_tile(isa, job.matrix, panels.clone(), &packed[at(index)..], height, out);
            }
        }
    });
}
