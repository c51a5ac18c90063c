//! The sweep over panels of 16 rows.

use super::product::{Lanes, add_product, transpose};
use super::{BLOCK, Feed, Sweep};
use crate::arch::{Kernel, LANES, Simd};

/// Weights and results of 16 rows.
pub(super) struct Panel {
    /// Weights in the order of the inputs, then of the sweep, `[in][16]`.
    weights: Vec<Lanes>,
    /// Its first row and number of rows.
    first: usize,
    rows: usize,
    /// Codes in the order of the inputs, `[in][16]`.
    pub(super) codes: Vec<[u8; LANES]>,
    /// `[groups][16]`.
    pub(super) scales: Vec<Lanes>,
    /// `[groups][16]`.
    pub(super) zeros: Vec<Lanes>,
    pub(super) losses: [f64; LANES],
    /// Errors of the current block.
    errors: Vec<Lanes>,
    /// Weights of the current block as they were before they were rounded; empty where none are passed
    /// on.
    passed: Vec<Lanes>,
}

impl Panel {
    /// Takes `rows` rows from row `first` of `weights` `[out, in]` on.
    pub(super) fn new(
        sweep: &Sweep<'_>,
        weights: &[f32],
        first: usize,
        rows: usize,
        groups: usize,
    ) -> Self {
        let columns = sweep.order.len();
        Self {
            weights: transpose(weights, first, rows, columns),
            first,
            rows,
            codes: vec![[0; LANES]; columns],
            scales: vec![[0.0; LANES]; groups],
            zeros: vec![[0.0; LANES]; groups],
            losses: [0.0; LANES],
            errors: vec![[0.0; LANES]; BLOCK],
            passed: Vec::new(),
        }
    }
}

/// Sweeps several panels, block by block.
pub(super) struct SweepPanels<'a> {
    pub(super) sweep: &'a Sweep<'a>,
    /// Weights `[out, in]` whose ranges give static scales.
    pub(super) ranges: &'a [f32],
    /// h of the column at each position of the sweep.
    pub(super) importance: &'a [f32],
    pub(super) feed: Feed<'a>,
    pub(super) panels: &'a mut [Panel],
}

impl Kernel for SweepPanels<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { sweep, ranges, importance, feed, panels } = self;
        let columns = sweep.order.len();
        // Columns of U inside the current block, made contiguous: [column][row].
        let mut inner = vec![0.0f32; BLOCK * BLOCK];
        let mut inner_passed = vec![0.0f32; feed.pass_on.map_or(0, |_| BLOCK * BLOCK)];
        for panel in panels.iter_mut() {
            panel.passed = vec![[0.0; LANES]; feed.pass_on.map_or(0, |_| BLOCK)];
            prepare::<S>(sweep, panel, ranges, importance);
        }
        for start in (0..columns).step_by(BLOCK) {
            let end = (start + BLOCK).min(columns);
            if let Some(u) = sweep.factor {
                for c in start..end {
                    for b in start..=c {
                        inner[(c - start) * BLOCK + b - start] = u[b * columns + c];
                    }
                }
            }
            if let Some(p) = feed.pass_on {
                for c in start..end {
                    for b in start..c {
                        inner_passed[(c - start) * BLOCK + b - start] = p[b * columns + c];
                    }
                }
            }
            for panel in panels.iter_mut() {
                let fed = Fed { first: feed.first, passed: &inner_passed };
                block::<S>(sweep, panel, start..end, &inner, fed, importance);
            }
            if let Some(p) = feed.pass_on {
                add_product::<S, _, false>(
                    panels,
                    |panel| (&panel.passed[..end - start], &mut panel.weights[..]),
                    p,
                    columns,
                    start..end,
                    end..columns,
                );
            }
            if let Some(u) = sweep.factor {
                // The errors of a block are taken out of all columns behind it.
                add_product::<S, _, true>(
                    panels,
                    |panel| (&panel.errors[..end - start], &mut panel.weights[..]),
                    u,
                    columns,
                    start..end,
                    end..columns,
                );
            }
        }
    }
}

/// Finds static scales and brings the weights into the order of the sweep.
#[inline(always)]
unsafe fn prepare<S: Simd>(
    sweep: &Sweep<'_>,
    panel: &mut Panel,
    ranges: &[f32],
    importance: &[f32],
) {
    let groups = panel.scales.len();
    if sweep.static_groups {
        let mut members: Vec<(Vec<Lanes>, Vec<f32>)> = vec![Default::default(); groups];
        // In input order, so that sums do not depend on the order of the sweep.
        let mut place = vec![(0, 0.0); sweep.order.len()];
        for ((&k, &g), &h) in sweep.order.iter().zip(sweep.groups).zip(importance) {
            place[k as usize] = (g as usize, h);
        }
        for (w, (g, h)) in transpose(ranges, panel.first, panel.rows, place.len()).iter().zip(place)
        {
            members[g].0.push(*w);
            members[g].1.push(h);
        }
        for (g, (members, importance)) in members.iter().enumerate() {
            let (scale, zero) = sweep.grid.find::<S>(members, importance);
            S::store(panel.scales[g].as_mut_ptr(), scale);
            S::store(panel.zeros[g].as_mut_ptr(), zero);
        }
    }
    panel.weights = sweep.order.iter().map(|&k| panel.weights[k as usize]).collect();
}

/// [`Feed`] as a block needs it.
#[derive(Clone, Copy)]
struct Fed<'a> {
    first: Option<&'a [f32]>,
    /// Columns of P inside the block, `[column][row]`; empty without P.
    passed: &'a [f32],
}

/// Quantizes the columns of one block, leaving their errors in `panel.errors`.
#[inline(always)]
unsafe fn block<S: Simd>(
    sweep: &Sweep<'_>,
    panel: &mut Panel,
    range: std::ops::Range<usize>,
    inner: &[f32],
    fed: Fed<'_>,
    importance: &[f32],
) {
    let (start, columns) = (range.start, sweep.order.len());
    for c in range {
        let g = sweep.groups[c] as usize;
        if !sweep.static_groups && (c == 0 || sweep.groups[c - 1] as usize != g) {
            // As in the reference, the range of a group that starts inside a block does not
            // see the corrections of that block.
            let end = (c..columns).find(|&i| sweep.groups[i] as usize != g).unwrap_or(columns);
            let (scale, zero) = sweep.grid.find::<S>(&panel.weights[c..end], &importance[c..end]);
            S::store(panel.scales[g].as_mut_ptr(), scale);
            S::store(panel.zeros[g].as_mut_ptr(), zero);
        }
        let mut w = S::load(panel.weights[c].as_ptr());
        let u = &inner[(c - start) * BLOCK..][..=c - start];
        if sweep.factor.is_some() {
            for (u, e) in u[..c - start].iter().zip(&panel.errors) {
                w = S::fnma(S::splat(*u), S::load(e.as_ptr()), w);
            }
        }
        if !fed.passed.is_empty() {
            let p = &fed.passed[(c - start) * BLOCK..][..c - start];
            for (p, v) in p.iter().zip(&panel.passed) {
                w = S::fma(S::splat(*p), S::load(v.as_ptr()), w);
            }
            S::store(panel.passed[c - start].as_mut_ptr(), w);
        }
        let (scale, zero) = (S::load(panel.scales[g].as_ptr()), S::load(panel.zeros[g].as_ptr()));
        let mut lanes = [0.0; LANES];
        let mut from = w;
        if let Some(first) = fed.first.filter(|_| c == 0) {
            lanes[..panel.rows].copy_from_slice(&first[panel.first..][..panel.rows]);
            from = S::load(lanes.as_ptr());
        }
        let (code, value) = sweep.grid.round::<S>(from, scale, zero);
        S::store(lanes.as_mut_ptr(), code);
        panel.codes[sweep.order[c] as usize] = lanes.map(|q| q as u8);
        if sweep.factor.is_some() {
            let error = S::div(S::sub(w, value), S::splat(u[c - start]));
            S::store(panel.errors[c - start].as_mut_ptr(), error);
            S::store(lanes.as_mut_ptr(), error);
            for (loss, e) in panel.losses.iter_mut().zip(lanes) {
                *loss += 0.5 * f64::from(e) * f64::from(e);
            }
        }
    }
}
