//! Scales and codes improved after a sweep.
//!
//! The sweep decides every code once, before it knows those behind it. With E = Ŵ - W and
//! G = H E the loss of a row is ½ E·G, and two kinds of steps can only lower it:
//!
//! * A group I gets the scale that is best for its codes: with N = q - z, s ← s - N·G_I / N·H_II N,
//!   rounded to f16 and taken only if the loss falls; asymmetric grids try it for z - 1 and z + 1
//!   too.
//! * A column gets the code nearest to where its loss is least: ŵ_j - G_j / H_jj.
//!
//! A round takes each group's scale and then its columns in turn (cyclic coordinate descent).
//! Corrections of G are collected for [`STEP`] columns, then for a segment of whole groups, so that
//! nearly all work is products of H with panels of 16 rows.

use std::ops::Range;

use super::product::{Lanes, add_product, transpose};
use super::{BLOCK, Grid, PANELS, Swept};
use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::pool::Pool;
use crate::tensor::RawSlice;

/// Columns whose corrections are collected one by one.
const STEP: usize = 32;

/// How to improve one layer.
#[derive(Debug, Clone, Copy)]
pub struct Refine<'a> {
    /// H `[in, in]`, symmetric, row-major, in the order of `order`.
    pub hessian: &'a [f32],
    /// What counts as its diagonal: the damped one, `[in]`, in the same order.
    pub diagonal: &'a [f32],
    /// Input column at each position, `[in]`.
    pub order: &'a [u32],
    /// Group at each position, `[in]`; every group occupies consecutive positions.
    pub groups: &'a [u32],
    /// The grid of the sweep.
    pub grid: Grid,
    /// Rounds over all columns.
    pub rounds: usize,
}

impl Refine<'_> {
    /// Improves `swept`, a solution for `weights` `[out, in]`, and sets its losses to
    /// ½ Σ ΔW H ΔWᵀ of each output. No loss rises. The result does not depend on the threads.
    ///
    /// # Panics
    /// If lengths do not fit or an index is out of range.
    #[track_caller]
    pub fn run(&self, pool: &Pool, weights: &[f32], swept: &mut Swept) {
        let columns = self.order.len();
        let outputs = swept.losses.len();
        assert_eq!(weights.len(), outputs * columns, "weights");
        assert_eq!(swept.codes.len(), weights.len(), "codes");
        assert_eq!(self.groups.len(), columns, "groups");
        assert_eq!(self.hessian.len(), columns * columns, "hessian");
        assert_eq!(self.diagonal.len(), columns, "diagonal");
        assert!(self.order.iter().all(|&k| (k as usize) < columns), "order");
        let groups = swept.scales.len() / outputs.max(1);
        assert!(self.groups.iter().all(|&g| (g as usize) < groups), "groups");
        let codes = RawSlice::new(&mut swept.codes);
        let scales = RawSlice::new(&mut swept.scales);
        let zeros = RawSlice::new(&mut swept.zeros);
        let losses = RawSlice::new(&mut swept.losses);
        let rows_per_task = PANELS * LANES;
        pool.run(outputs.div_ceil(rows_per_task), &|task| {
            let starts = (task * rows_per_task..outputs.min((task + 1) * rows_per_task))
                .step_by(LANES)
                .map(|first| first..(first + LANES).min(outputs));
            // SAFETY: the columns of these rows belong to this task.
            unsafe {
                let mut panels: Vec<Panel> = starts
                    .map(|rows| {
                        let mut panel = Panel::new(weights, self.order, rows.clone(), groups);
                        for (&k, to) in self.order.iter().zip(&mut panel.codes) {
                            let from = codes.range(k as usize * outputs + rows.start, rows.len());
                            to.iter_mut().zip(from).for_each(|(t, q)| *t = f32::from(*q));
                        }
                        for g in 0..groups {
                            let at = g * outputs + rows.start;
                            panel.scales[g][..rows.len()]
                                .copy_from_slice(scales.range(at, rows.len()));
                            let from = zeros.range(at, rows.len());
                            let to = &mut panel.zeros[g];
                            to.iter_mut().zip(from).for_each(|(t, z)| *t = f32::from(*z));
                        }
                        panel
                    })
                    .collect();
                dispatch(RefinePanels { refine: self, panels: &mut panels });
                for panel in &panels {
                    // A loss that f32 cannot tell from the one before stays as it was.
                    for (lane, row) in panel.rows.clone().enumerate() {
                        let (before, after) = (panel.before[lane], panel.after[lane]);
                        losses.range(row, 1)[0] = before.min(after);
                        if after >= before {
                            continue;
                        }
                        for (&k, q) in self.order.iter().zip(&panel.codes) {
                            codes.range(k as usize * outputs + row, 1)[0] = q[lane] as u8;
                        }
                        for g in 0..groups {
                            scales.range(g * outputs + row, 1)[0] = panel.scales[g][lane];
                            zeros.range(g * outputs + row, 1)[0] = panel.zeros[g][lane] as u8;
                        }
                    }
                }
            }
        });
    }
}

/// 16 rows; columns in the order of the positions.
struct Panel {
    rows: Range<usize>,
    weights: Vec<Lanes>,
    codes: Vec<Lanes>,
    /// `[groups][16]`.
    scales: Vec<Lanes>,
    /// `[groups][16]`.
    zeros: Vec<Lanes>,
    /// G = H (Ŵ - W).
    gradient: Vec<Lanes>,
    /// What has changed in Ŵ and is not in G yet, or not in all of G.
    change: Vec<Lanes>,
    /// What has changed in Ŵ in this segment.
    segment: Vec<Lanes>,
    /// H_II N of a group.
    product: Vec<Lanes>,
    /// ½ E·G at first and in the end.
    before: [f64; LANES],
    after: [f64; LANES],
}

impl Panel {
    fn new(weights: &[f32], order: &[u32], rows: Range<usize>, groups: usize) -> Self {
        let columns = order.len();
        let natural = transpose(weights, rows.start, rows.len(), columns);
        let zeros = || vec![[0.0; LANES]; columns];
        Self {
            rows,
            weights: order.iter().map(|&k| natural[k as usize]).collect(),
            codes: zeros(),
            // Lanes without a row: any scale but 0.
            scales: vec![[1.0; LANES]; groups],
            zeros: vec![[0.0; LANES]; groups],
            gradient: zeros(),
            change: zeros(),
            segment: zeros(),
            product: zeros(),
            before: [0.0; LANES],
            after: [0.0; LANES],
        }
    }

    /// Ŵ - W of a column.
    #[inline(always)]
    unsafe fn error<S: Simd>(&self, c: usize, group: usize) -> S::F {
        let (s, z) = (S::load(self.scales[group].as_ptr()), S::load(self.zeros[group].as_ptr()));
        let steps = S::sub(S::load(self.codes[c].as_ptr()), z);
        S::sub(S::mul(s, steps), S::load(self.weights[c].as_ptr()))
    }

    /// ½ E·G.
    #[inline(always)]
    unsafe fn loss<S: Simd>(&self, groups: &[u32]) -> [f64; LANES] {
        let mut loss = [0.0; LANES];
        let mut lanes = [0.0; LANES];
        for (c, (&g, gradient)) in groups.iter().zip(&self.gradient).enumerate() {
            let e = self.error::<S>(c, g as usize);
            S::store(lanes.as_mut_ptr(), S::mul(e, S::load(gradient.as_ptr())));
            loss.iter_mut().zip(lanes).for_each(|(l, x)| *l += 0.5 * f64::from(x));
        }
        loss
    }
}

struct RefinePanels<'a> {
    refine: &'a Refine<'a>,
    panels: &'a mut [Panel],
}

impl Kernel for RefinePanels<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { refine, panels } = self;
        let columns = refine.order.len();
        for panel in panels.iter_mut() {
            for c in 0..columns {
                let error = panel.error::<S>(c, refine.groups[c] as usize);
                S::store(panel.change[c].as_mut_ptr(), error);
            }
        }
        for start in (0..columns).step_by(BLOCK) {
            let end = (start + BLOCK).min(columns);
            update::<S>(refine, panels, start..end, 0..columns);
        }
        for panel in panels.iter_mut() {
            panel.before = panel.loss::<S>(refine.groups);
        }
        for _ in 0..refine.rounds {
            let mut start = 0;
            while start < columns {
                let end = segment_end(refine.groups, start);
                segment::<S>(refine, panels, start..end);
                start = end;
            }
        }
        for panel in panels.iter_mut() {
            panel.after = panel.loss::<S>(refine.groups);
        }
    }
}

/// Where the group at a position ends.
fn group_end(groups: &[u32], start: usize) -> usize {
    (start..groups.len()).find(|&c| groups[c] != groups[start]).unwrap_or(groups.len())
}

/// Where as many whole groups end as fit a block; at least one.
fn segment_end(groups: &[u32], start: usize) -> usize {
    let mut end = group_end(groups, start);
    while end < groups.len() {
        let next = group_end(groups, end);
        if next - start > BLOCK {
            break;
        }
        end = next;
    }
    end
}

/// G += H change, from columns `sources` to columns `targets`, which contain them.
#[inline(always)]
unsafe fn update<S: Simd>(
    refine: &Refine<'_>,
    panels: &mut [Panel],
    sources: Range<usize>,
    targets: Range<usize>,
) {
    let columns = refine.order.len();
    add_product::<S, _, false>(
        panels,
        |panel| (&panel.change[sources.clone()], &mut panel.gradient[..]),
        refine.hessian,
        columns,
        sources.clone(),
        targets,
    );
    // The damping is not in the matrix.
    for c in sources {
        let damping = S::splat(refine.diagonal[c] - refine.hessian[c * columns + c]);
        for panel in panels.iter_mut() {
            let g = panel.gradient[c].as_mut_ptr();
            let change = S::load(panel.change[c].as_ptr());
            S::store(g, S::fma(damping, change, S::load(g)));
        }
    }
}

/// Scales and codes of the groups in `range`.
#[inline(always)]
unsafe fn segment<S: Simd>(refine: &Refine<'_>, panels: &mut [Panel], range: Range<usize>) {
    let columns = refine.order.len();
    for panel in panels.iter_mut() {
        panel.segment[range.clone()].fill([0.0; LANES]);
    }
    let mut start = range.start;
    while start < range.end {
        let end = group_end(refine.groups, start);
        rescale::<S>(refine, panels, start..end, range.clone());
        start = end;
    }
    for start in range.clone().step_by(STEP) {
        let end = (start + STEP).min(range.end);
        descend::<S>(refine, panels, start..end);
        update::<S>(refine, panels, start..end, range.clone());
        add_to_segment::<S>(panels, start..end);
    }
    for targets in [0..range.start, range.end..columns] {
        let h = refine.hessian;
        add_product::<S, _, false>(
            panels,
            |panel| (&panel.segment[range.clone()], &mut panel.gradient[..]),
            h,
            columns,
            range.clone(),
            targets,
        );
    }
}

/// Enters changes into those of the segment.
#[inline(always)]
unsafe fn add_to_segment<S: Simd>(panels: &mut [Panel], range: Range<usize>) {
    for panel in panels.iter_mut() {
        let Panel { segment, change, .. } = panel;
        for (to, from) in segment[range.clone()].iter_mut().zip(&change[range.clone()]) {
            let sum = S::add(S::load(to.as_ptr()), S::load(from.as_ptr()));
            S::store(to.as_mut_ptr(), sum);
        }
    }
}

/// Gives the group in `range` the best scale and zero point for its codes, and brings G up to date in
/// the columns of `segment`.
#[inline(always)]
unsafe fn rescale<S: Simd>(
    refine: &Refine<'_>,
    panels: &mut [Panel],
    range: Range<usize>,
    segment: Range<usize>,
) {
    let (columns, grid) = (refine.order.len(), refine.grid);
    let group = refine.groups[range.start] as usize;
    let zero = S::splat(0.0);
    for panel in panels.iter_mut() {
        let z = S::load(panel.zeros[group].as_ptr());
        for c in range.clone() {
            let steps = S::sub(S::load(panel.codes[c].as_ptr()), z);
            S::store(panel.change[c].as_mut_ptr(), steps);
            panel.product[c] = [0.0; LANES];
        }
    }
    let h = refine.hessian;
    add_product::<S, _, false>(
        panels,
        |panel| (&panel.change[range.clone()], &mut panel.product[..]),
        h,
        columns,
        range.clone(),
        range.clone(),
    );
    // 1ᵀ H_II 1, the same for all rows.
    let mut ones = 0.0;
    for b in range.clone() {
        let row = &h[b * columns..][range.clone()];
        ones += row.iter().map(|&h| f64::from(h)).sum::<f64>();
        ones += f64::from(refine.diagonal[b] - h[b * columns + b]);
    }
    let oo = S::splat(ones as f32);
    for panel in panels.iter_mut() {
        // n: the steps N, o: ones, g: the gradient, h: products with H_II.
        let (mut ng, mut og, mut nn, mut no) = (zero, zero, zero, zero);
        for c in range.clone() {
            let damping = S::splat(refine.diagonal[c] - h[c * columns + c]);
            let n = S::load(panel.change[c].as_ptr());
            let hn = S::fma(damping, n, S::load(panel.product[c].as_ptr()));
            let g = S::load(panel.gradient[c].as_ptr());
            ng = S::fma(n, g, ng);
            og = S::add(og, g);
            nn = S::fma(n, hn, nn);
            no = S::add(no, hn);
        }
        let old_scale = S::load(panel.scales[group].as_ptr());
        let old_zero = S::load(panel.zeros[group].as_ptr());
        let (mut scale, mut offset, mut least) = (old_scale, old_zero, zero);
        let shifts: &[f32] = if grid.sym { &[0.0] } else { &[0.0, -1.0, 1.0] };
        for &shift in shifts {
            // Ŵ changes by d N - s t 1, with s = old + d the new scale and t the shift.
            let t = S::splat(shift);
            let new_zero = S::add(old_zero, t);
            let a = S::fma(S::mul(t, t), oo, S::fnma(S::add(t, t), no, nn));
            let b = S::fnma(t, og, ng);
            let b = S::fma(S::mul(old_scale, t), S::fnma(no, S::splat(1.0), S::mul(t, oo)), b);
            let s = grid.storable::<S>(S::sub(old_scale, S::div(b, a)));
            let (d, u) = (S::sub(s, old_scale), S::mul(s, t));
            // d N·G - u 1·G + ½ (d² N·HN - 2 d u N·H1 + u² 1·H1)
            let linear = S::fnma(u, og, S::mul(d, ng));
            let square = S::fma(S::mul(u, u), oo, S::mul(S::mul(d, d), nn));
            let square = S::fnma(S::mul(S::add(d, d), u), no, square);
            let gain = S::fma(S::splat(0.5), square, linear);
            let mut taken = S::select(S::lt(gain, least), gain, least);
            // Only what the format can hold; a group whose codes are all zero steps has no scale.
            let (low, high) = (f32::from(grid.min_zero), grid.max_code() as f32);
            taken = S::select(S::lt(new_zero, S::splat(low)), least, taken);
            taken = S::select(S::lt(S::splat(high), new_zero), least, taken);
            if !(grid.sym && grid.signed) {
                taken = S::select(S::lt(s, zero), least, taken);
            }
            let better = S::lt(taken, least);
            scale = S::select(better, s, scale);
            offset = S::select(better, new_zero, offset);
            least = S::select(better, taken, least);
        }
        S::store(panel.scales[group].as_mut_ptr(), scale);
        S::store(panel.zeros[group].as_mut_ptr(), offset);
        for c in range.clone() {
            let q = S::load(panel.codes[c].as_ptr());
            let old = S::mul(old_scale, S::sub(q, old_zero));
            let new = S::mul(scale, S::sub(q, offset));
            S::store(panel.change[c].as_mut_ptr(), S::sub(new, old));
        }
    }
    update::<S>(refine, panels, range.clone(), segment);
    add_to_segment::<S>(panels, range);
}

/// Gives each column in turn its best code; `change` holds what that changes in Ŵ.
#[inline(always)]
unsafe fn descend<S: Simd>(refine: &Refine<'_>, panels: &mut [Panel], range: Range<usize>) {
    let (columns, start) = (refine.order.len(), range.start);
    let (zero, top) = (S::splat(0.0), S::splat(refine.grid.max_code() as f32));
    // H inside the range, made contiguous: [column][row].
    let mut inner = [[0.0f32; STEP]; STEP];
    for (b, row) in range.clone().enumerate() {
        for (c, h) in refine.hessian[row * columns..][range.clone()].iter().enumerate() {
            inner[c][b] = *h;
        }
    }
    for (i, c) in range.enumerate() {
        let diagonal = S::splat(refine.diagonal[c]);
        let inverse = S::splat(1.0 / refine.diagonal[c]);
        let group = refine.groups[c] as usize;
        for panel in panels.iter_mut() {
            let mut g = S::load(panel.gradient[c].as_ptr());
            for (h, change) in inner[i][..i].iter().zip(&panel.change[start..]) {
                g = S::fma(S::splat(*h), S::load(change.as_ptr()), g);
            }
            let scale = S::load(panel.scales[group].as_ptr());
            let offset = S::load(panel.zeros[group].as_ptr());
            let old = S::load(panel.codes[c].as_ptr());
            let target = S::fnma(g, inverse, S::mul(scale, S::sub(old, offset)));
            let new = S::add(S::round(S::div(target, scale)), offset);
            let new = S::min(S::max(new, zero), top);
            let change = S::mul(scale, S::sub(new, old));
            let gain = S::mul(change, S::fma(S::mul(S::splat(0.5), diagonal), change, g));
            let better = S::lt(gain, zero);
            S::store(panel.codes[c].as_mut_ptr(), S::select(better, new, old));
            S::store(panel.change[c].as_mut_ptr(), S::select(better, change, zero));
        }
    }
}
