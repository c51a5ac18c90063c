//! Rounding to nearest with the range of each group cut where the output error is least: the
//! clipping search of AWQ (Lin et al. 2023, section 4), on the Hessian instead of on kept
//! activations.
//!
//! With E = Ŵ - W and G = H E the output error of a row is E·G. Every group first gets the range of
//! its weights. Then, group after group, the range is cut to p = 0.97, 0.94, ... of itself: the error
//! that the cut makes, all other groups as they are, is δ·(H_II δ + 2 c) with δ the error inside the
//! group I and c = G_I - H_II E_I what the other groups contribute. The p of the least error stays,
//! so that no row's error rises.

use std::ops::Range;

use super::product::{Lanes, add_product, transpose};
use super::{BLOCK, Grid, PANELS, Swept};
use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::pool::Pool;
use crate::tensor::RawSlice;

/// Cuts that are tried beside the whole range.
const CUTS: u8 = 20;
/// What each takes from the range, in percent.
const PERCENT: u8 = 3;

/// How to round one layer.
#[derive(Debug, Clone, Copy)]
pub struct Clip<'a> {
    /// H `[in, in]`, symmetric, row-major.
    pub hessian: &'a [f32],
    /// Its width.
    pub inputs: usize,
    /// Neighbouring inputs that share a scale; the last group may be shorter.
    pub group_len: usize,
    /// The grid; its search is not used.
    pub grid: Grid,
}

impl Clip<'_> {
    /// Rounds `weights` `[out, in]`, row-major. The losses are ½ ΔW H ΔWᵀ of each output. The result
    /// does not depend on the threads.
    ///
    /// # Panics
    /// If lengths do not fit or the groups are empty.
    #[track_caller]
    pub fn run(&self, pool: &Pool, weights: &[f32]) -> Swept {
        let columns = self.inputs;
        let outputs = weights.len() / columns.max(1);
        assert_eq!(weights.len(), outputs * columns, "weights");
        assert_eq!(self.hessian.len(), columns * columns, "hessian");
        assert!(self.group_len > 0, "group length");
        let groups = columns.div_ceil(self.group_len);
        let mut swept = Swept {
            codes: vec![0; columns * outputs],
            scales: vec![0.0; groups * outputs],
            zeros: vec![0; groups * outputs],
            losses: vec![0.0; outputs],
        };
        let codes = RawSlice::new(&mut swept.codes);
        let scales = RawSlice::new(&mut swept.scales);
        let zeros = RawSlice::new(&mut swept.zeros);
        let losses = RawSlice::new(&mut swept.losses);
        let rows_per_task = PANELS * LANES;
        pool.run(outputs.div_ceil(rows_per_task), &|task| {
            let mut panels: Vec<Panel> = (task * rows_per_task
                ..outputs.min((task + 1) * rows_per_task))
                .step_by(LANES)
                .map(|first| {
                    Panel::new(weights, first..(first + LANES).min(outputs), columns, groups)
                })
                .collect();
            dispatch(ClipPanels { clip: self, panels: &mut panels });
            for panel in &panels {
                let (first, rows) = (panel.rows.start, panel.rows.len());
                // SAFETY: the columns of these rows belong to this task.
                unsafe {
                    for (k, lanes) in panel.codes.iter().enumerate() {
                        codes.range(k * outputs + first, rows).copy_from_slice(&lanes[..rows]);
                    }
                    for g in 0..groups {
                        let at = g * outputs + first;
                        scales.range(at, rows).copy_from_slice(&panel.scales[g][..rows]);
                        let to = zeros.range(at, rows);
                        to.iter_mut().zip(&panel.zeros[g]).for_each(|(t, z)| *t = *z as u8);
                    }
                    losses.range(first, rows).copy_from_slice(&panel.losses[..rows]);
                }
            }
        });
        swept
    }
}

/// 16 rows.
struct Panel {
    rows: Range<usize>,
    weights: Vec<Lanes>,
    codes: Vec<[u8; LANES]>,
    /// `[groups][16]`.
    scales: Vec<Lanes>,
    /// `[groups][16]`.
    zeros: Vec<Lanes>,
    /// E = Ŵ - W.
    errors: Vec<Lanes>,
    /// G = H E.
    gradient: Vec<Lanes>,
    /// δ of a candidate, then what has changed in E.
    change: Vec<Lanes>,
    /// H_II δ.
    product: Vec<Lanes>,
    losses: [f64; LANES],
}

impl Panel {
    fn new(weights: &[f32], rows: Range<usize>, columns: usize, groups: usize) -> Self {
        let zeros = || vec![[0.0; LANES]; columns];
        Self {
            weights: transpose(weights, rows.start, rows.len(), columns),
            rows,
            codes: vec![[0; LANES]; columns],
            scales: vec![[0.0; LANES]; groups],
            zeros: vec![[0.0; LANES]; groups],
            errors: zeros(),
            gradient: zeros(),
            change: zeros(),
            product: zeros(),
            losses: [0.0; LANES],
        }
    }
}

/// Scale and zero point of one group in every lane, and the error that they make.
struct Choice<S: Simd> {
    error: S::F,
    scale: S::F,
    zero: S::F,
}

struct ClipPanels<'a> {
    clip: &'a Clip<'a>,
    panels: &'a mut [Panel],
}

impl Kernel for ClipPanels<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { clip, panels } = self;
        let columns = clip.inputs;
        for panel in panels.iter_mut() {
            for (g, range) in clip.ranges().enumerate() {
                let (low, high) = extent::<S>(&panel.weights[range.clone()]);
                let (scale, zero) = clip.grid.of_range::<S>(low, high, 1.0);
                S::store(panel.scales[g].as_mut_ptr(), scale);
                S::store(panel.zeros[g].as_mut_ptr(), zero);
                for k in range {
                    let w = S::load(panel.weights[k].as_ptr());
                    let (_, value) = clip.grid.round::<S>(w, scale, zero);
                    S::store(panel.errors[k].as_mut_ptr(), S::sub(value, w));
                }
            }
        }
        for start in (0..columns).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(columns);
            add_product::<S, _, false>(
                panels,
                |panel| (&panel.errors[block.clone()], &mut panel.gradient[..]),
                clip.hessian,
                columns,
                block.clone(),
                0..columns,
            );
        }
        for (g, range) in clip.ranges().enumerate() {
            cut::<S>(clip, panels, g, range);
        }
        let mut lanes = [0.0; LANES];
        for panel in panels.iter_mut() {
            for (e, g) in panel.errors.iter().zip(&panel.gradient) {
                S::store(lanes.as_mut_ptr(), S::mul(S::load(e.as_ptr()), S::load(g.as_ptr())));
                panel.losses.iter_mut().zip(lanes).for_each(|(l, x)| *l += 0.5 * f64::from(x));
            }
        }
    }
}

impl Clip<'_> {
    /// The inputs of each group.
    fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (columns, len) = (self.inputs, self.group_len);
        (0..columns).step_by(len).map(move |first| first..(first + len).min(columns))
    }
}

/// Least and largest weight of each lane, 0 included.
#[inline(always)]
unsafe fn extent<S: Simd>(weights: &[Lanes]) -> (S::F, S::F) {
    let (mut low, mut high) = (S::splat(0.0), S::splat(0.0));
    for w in weights {
        let w = S::load(w.as_ptr());
        (low, high) = (S::min(low, w), S::max(high, w));
    }
    (low, high)
}

/// H_II δ of the candidate in `change`, into `product`.
#[inline(always)]
unsafe fn multiply<S: Simd>(clip: &Clip<'_>, panels: &mut [Panel], range: Range<usize>) {
    for panel in panels.iter_mut() {
        panel.product[range.clone()].fill([0.0; LANES]);
    }
    add_product::<S, _, false>(
        panels,
        |panel| (&panel.change[range.clone()], &mut panel.product[..]),
        clip.hessian,
        clip.inputs,
        range.clone(),
        range.clone(),
    );
}

/// Cuts group `g`, the inputs in `range`, and brings G up to date.
#[inline(always)]
unsafe fn cut<S: Simd>(clip: &Clip<'_>, panels: &mut [Panel], g: usize, range: Range<usize>) {
    // c = G_I - H_II E_I takes the place of G_I; the candidate that is there is the first choice.
    for panel in panels.iter_mut() {
        let Panel { change, errors, .. } = panel;
        change[range.clone()].copy_from_slice(&errors[range.clone()]);
    }
    multiply::<S>(clip, panels, range.clone());
    let mut best: Vec<Choice<S>> = Vec::with_capacity(panels.len());
    for panel in panels.iter_mut() {
        for k in range.clone() {
            let gradient = panel.gradient[k].as_mut_ptr();
            let c = S::sub(S::load(gradient), S::load(panel.product[k].as_ptr()));
            S::store(gradient, c);
        }
        best.push(Choice {
            error: energy::<S>(panel, range.clone()),
            scale: S::load(panel.scales[g].as_ptr()),
            zero: S::load(panel.zeros[g].as_ptr()),
        });
    }
    let signs: &[f32] = if clip.grid.sym && clip.grid.signed { &[1.0, -1.0] } else { &[1.0] };
    for cut in 0..=CUTS {
        let p = 1.0 - f32::from(cut) * f32::from(PERCENT) / 100.0;
        for &sign in signs {
            for panel in panels.iter_mut() {
                let (low, high) = extent::<S>(&panel.weights[range.clone()]);
                let (scale, zero) = clip.grid.of_range::<S>(low, high, sign * p);
                for k in range.clone() {
                    let w = S::load(panel.weights[k].as_ptr());
                    let (_, value) = clip.grid.round::<S>(w, scale, zero);
                    S::store(panel.change[k].as_mut_ptr(), S::sub(value, w));
                }
                S::store(panel.scales[g].as_mut_ptr(), scale);
                S::store(panel.zeros[g].as_mut_ptr(), zero);
            }
            multiply::<S>(clip, panels, range.clone());
            for (panel, best) in panels.iter_mut().zip(&mut best) {
                let error = energy::<S>(panel, range.clone());
                let better = S::lt(error, best.error);
                best.error = S::select(better, error, best.error);
                let scale = S::load(panel.scales[g].as_ptr());
                best.scale = S::select(better, scale, best.scale);
                best.zero = S::select(better, S::load(panel.zeros[g].as_ptr()), best.zero);
            }
        }
    }
    for (panel, best) in panels.iter_mut().zip(&best) {
        S::store(panel.scales[g].as_mut_ptr(), best.scale);
        S::store(panel.zeros[g].as_mut_ptr(), best.zero);
        let mut lanes = [0.0; LANES];
        for k in range.clone() {
            let w = S::load(panel.weights[k].as_ptr());
            let (code, value) = clip.grid.round::<S>(w, best.scale, best.zero);
            S::store(lanes.as_mut_ptr(), code);
            panel.codes[k] = lanes.map(|q| q as u8);
            let (e, was) = (S::sub(value, w), S::load(panel.errors[k].as_ptr()));
            S::store(panel.errors[k].as_mut_ptr(), e);
            // In the group's own columns G holds c, where nothing of E_I is left.
            S::store(panel.product[k].as_mut_ptr(), e);
            S::store(panel.change[k].as_mut_ptr(), S::sub(e, was));
        }
    }
    let h = clip.hessian;
    add_product::<S, _, false>(
        panels,
        |panel| (&panel.product[range.clone()], &mut panel.gradient[..]),
        h,
        clip.inputs,
        range.clone(),
        range.clone(),
    );
    for targets in [0..range.start, range.end..clip.inputs] {
        add_product::<S, _, false>(
            panels,
            |panel| (&panel.change[range.clone()], &mut panel.gradient[..]),
            h,
            clip.inputs,
            range.clone(),
            targets,
        );
    }
}

/// δ·(H_II δ + 2 c), with δ in `change`, H_II δ in `product` and c in `gradient`.
#[inline(always)]
unsafe fn energy<S: Simd>(panel: &Panel, range: Range<usize>) -> S::F {
    let mut sum = S::splat(0.0);
    for k in range {
        let c = S::load(panel.gradient[k].as_ptr());
        let h = S::add(S::load(panel.product[k].as_ptr()), S::add(c, c));
        sum = S::fma(S::load(panel.change[k].as_ptr()), h, sum);
    }
    sum
}
