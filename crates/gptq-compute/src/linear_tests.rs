//! Properties of quantized products: every instruction set, width, group, tail and batch against
//! an oracle in f64.

use std::ops::Range;

use half::{bf16, f16};

use crate::arch::{Isa, Pairs, pairs};
use crate::linear::linear_on;
use crate::{
    Activations, BlockParts, BlockRows, GptqParts, Linear, Matrix, Pool, QuantizedMatrix, Scratch,
    Tensor,
};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }
    fn unit(&mut self) -> f32 {
        self.next() as f32 / u32::MAX as f32 * 2.0 - 1.0
    }
}

struct Case {
    linear: Linear,
    /// Dequantized weights `[out, in]`.
    dense: Vec<f32>,
    /// Inputs of each group.
    groups: Vec<Vec<usize>>,
}

impl Case {
    /// `x` as the kernels of `isa` take it.
    fn input(&self, isa: Isa, activations: Activations, x: &[f32]) -> Vec<f64> {
        match (activations, pairs(isa)) {
            (Activations::F32, _) => x.iter().map(|&v| f64::from(v)).collect(),
            (Activations::Int8, _) => self.integers(x, 32, 127.0),
            (Activations::Bf16, Some(Pairs::Int16)) => self.integers(x, 128, 32767.0),
            (Activations::Bf16, _) => x.iter().map(|&v| bf16::from_f32(v).to_f64()).collect(),
        }
    }

    /// `x` as integers up to `limit`, with a scale for each `block` inputs of a group.
    fn integers(&self, x: &[f32], block: usize, limit: f32) -> Vec<f64> {
        let mut taken = vec![0.0; x.len()];
        for block in self.groups.iter().flat_map(|g| g.chunks(block)) {
            let largest = block.iter().fold(0.0f32, |m, &k| m.max(x[k].abs()));
            let inverse = if largest > 0.0 { limit / largest } else { 0.0 };
            for &k in block {
                let code = (x[k] * inverse).round_ties_even();
                assert!(code.abs() <= limit);
                taken[k] = f64::from(code) * f64::from(largest / limit);
            }
        }
        taken
    }

    /// Row `j` of y = W x + b, and the sum of the magnitudes of its terms.
    fn expected(&self, x: &[f64], j: usize) -> (f64, f64) {
        let row = &self.dense[j * x.len()..(j + 1) * x.len()];
        let terms = x.iter().zip(row).map(|(x, w)| x * f64::from(*w));
        let bias = f64::from(self.linear.bias.as_ref().unwrap()[j]);
        (terms.clone().sum::<f64>() + bias, terms.map(f64::abs).sum())
    }
}

fn case(
    r: &mut Random,
    bits: u32,
    k: usize,
    n: usize,
    group: usize,
    act_order: bool,
    sym: bool,
) -> Case {
    let groups = k.div_ceil(group);
    let codes: Vec<u32> = (0..k * n).map(|_| r.next() >> (32 - bits)).collect();
    let mut qweight = vec![0u32; k * bits as usize / 32 * n];
    for i in 0..k {
        for j in 0..n {
            for b in 0..bits as usize {
                let at = i * bits as usize + b;
                qweight[at / 32 * n + j] |= (codes[i * n + j] >> b & 1) << (at % 32);
            }
        }
    }
    // Of either sign: symmetric grids may have negative scales.
    let mut scale = || {
        let x = r.unit();
        f16::from_f32((0.01 + 0.1 * x.abs()).copysign(x))
    };
    let scales: Vec<f16> = (0..groups * n).map(|_| scale()).collect();
    let zeros: Vec<u8> = (0..groups * n)
        .map(|_| if sym { 1 << (bits - 1) } else { (r.next() >> (32 - bits)) as u8 })
        .collect();
    let mut g_idx: Vec<u32> = (0..k).map(|i| (i / group) as u32).collect();
    if act_order {
        for i in (1..k).rev() {
            g_idx.swap(i, r.next() as usize % (i + 1));
        }
    }
    let mut dense = vec![0.0; n * k];
    for i in 0..k {
        for j in 0..n {
            let at = g_idx[i] as usize * n + j;
            dense[j * k + i] =
                scales[at].to_f32() * (codes[i * n + j] as f32 - f32::from(zeros[at]));
        }
    }
    let parts = GptqParts {
        bits,
        in_features: k,
        out_features: n,
        qweight: &qweight,
        scales: &scales,
        zeros: &zeros,
        g_idx: &g_idx,
    };
    let weight = Matrix::Quantized(QuantizedMatrix::from_gptq(parts).unwrap());
    let of = |g| (0..k).filter(|&i| g_idx[i] as usize == g).collect();
    let groups = (0..groups).map(of).collect();
    Case {
        linear: Linear { weight, bias: Some((0..n).map(|_| r.unit()).collect()) },
        dense,
        groups,
    }
}

/// A matrix of block-quantized rows, as GGUF files have them: bits of the codes, group, whether there are minima and
/// whether f16 holds them.
const BLOCKS: [(u32, usize, bool, bool); 10] = [
    (4, 32, false, true),
    (4, 32, true, true),
    (5, 32, false, true),
    (5, 32, true, true),
    (8, 32, false, true),
    (2, 16, true, false),
    (3, 16, false, false),
    (4, 32, true, false),
    (5, 32, true, false),
    (6, 16, false, false),
];

fn block_case(r: &mut Random, k: usize, n: usize, format: (u32, usize, bool, bool)) -> Case {
    let (bits, group, minima, half) = format;
    let groups = k / group;
    let codes: Vec<u8> = (0..n * k).map(|_| (r.next() >> (32 - bits)) as u8).collect();
    let mut value = |size: f32| {
        let x = (0.1 + r.unit().abs()) * size;
        if half { f16::from_f32(x).to_f32() } else { x }
    };
    let scales: Vec<f32> = (0..n * groups).map(|_| value(1.0 / (1 << bits) as f32)).collect();
    let smallest: Vec<f32> =
        (0..if minima { n * groups } else { 0 }).map(|_| -value(0.5)).collect();
    let dense = (0..n * k).map(|i| {
        let (at, code) = (i / k * groups + i % k / group, f32::from(codes[i]));
        match smallest.get(at) {
            Some(minimum) => scales[at] * code + minimum,
            None => scales[at] * (code - (1 << (bits - 1)) as f32),
        }
    });
    let dense = dense.collect();
    let parts =
        BlockParts { bits, group_size: group, minima, half, in_features: k, out_features: n };
    let read = |rows: Range<usize>, to: BlockRows<'_>| {
        to.codes.copy_from_slice(&codes[rows.start * k..rows.end * k]);
        let rows = rows.start * groups..rows.end * groups;
        to.scales.copy_from_slice(&scales[rows.clone()]);
        if minima {
            to.minima.copy_from_slice(&smallest[rows]);
        }
        Ok::<_, ()>(())
    };
    let weight =
        Matrix::Quantized(QuantizedMatrix::from_blocks(&Pool::new(2), parts, read).unwrap());
    assert_eq!(weight.bytes() as u64, parts.bytes());
    Case {
        linear: Linear { weight, bias: Some((0..n).map(|_| r.unit()).collect()) },
        dense,
        groups: (0..groups).map(|g| (g * group..(g + 1) * group).collect()).collect(),
    }
}

/// Shapes (inputs, outputs, group) that end inside units, blocks, vectors and strips.
const SHAPES: [(usize, usize, usize); 9] = [
    (32, 1, 8),
    (64, 100, 64),
    (96, 40, 64),
    (128, 67, 16),
    (160, 33, 24),
    (160, 130, 32),
    (288, 48, 288),
    (416, 64, 128),
    (576, 16, 128),
];

/// Runs `check` on every width, shape, column order and symmetry, in all compute modes.
fn each_case(seed: u64, check: impl Fn(&mut Random, &Case, &Case, usize, Activations, &str)) {
    let mut r = Random(seed);
    let modes = [Activations::F32, Activations::Bf16, Activations::Int8];
    for format in BLOCKS {
        for (k, n) in [(32, 1), (96, 67), (288, 130)] {
            let one = block_case(&mut r, k, n, format);
            let other = block_case(&mut r, k, 2 * n, format);
            for activations in modes {
                let name = format!("{activations:?} blocks {format:?} {k}x{n} seed {seed:x}");
                check(&mut r, &one, &other, k, activations, &name);
            }
        }
    }
    for bits in [2, 3, 4, 8] {
        for (k, n, group) in SHAPES {
            for (act_order, sym) in [(false, true), (false, false), (true, false), (true, true)] {
                let one = case(&mut r, bits, k, n, group, act_order, sym);
                // Another layer on the same input, with other tails and symmetry.
                let other = case(&mut r, bits, k, 2 * n, group, act_order, !sym);
                for activations in modes {
                    let name = format!(
                        "{activations:?} {bits} bits {k}x{n} group {group} act-order {act_order} sym {sym} seed {seed:x}"
                    );
                    check(&mut r, &one, &other, k, activations, &name);
                }
            }
        }
    }
}

#[test]
fn all_instruction_sets_agree_with_f64() {
    let pool = Pool::new(2);
    each_case(0x5EED_CAFE, |r, c, _, k, activations, name| {
        let mut scratch = Scratch::default();
        scratch.set_activations(activations);
        for m in [3, 21] {
            let x = Tensor::from_vec(m, k, (0..m * k).map(|_| r.unit()).collect());
            let mut oracle: Option<Tensor> = None;
            for isa in Isa::available() {
                let mut y = Tensor::default();
                linear_on(isa, &pool, &x, &mut [(&c.linear, &mut y)], &mut scratch);
                for i in [0, m / 2, m - 1] {
                    let taken = c.input(isa, activations, x.row(i));
                    for j in 0..y.cols() {
                        let (want, size) = c.expected(&taken, j);
                        let got = f64::from(y.row(i)[j]);
                        // f32 sums of k terms of this size; zero points come out last, hence the
                        // factor.
                        let error = (got - want).abs();
                        assert!(error < 4e-6 * (size + 1.0), "{isa:?} {name}: {got} {want}");
                    }
                }
                // Integers leave nothing to the instruction set.
                let int16 = activations == Activations::Bf16 && pairs(isa) == Some(Pairs::Int16);
                if activations == Activations::Int8 || int16 {
                    let oracle = oracle.get_or_insert_with(|| y.clone());
                    assert_eq!(oracle.as_slice(), y.as_slice(), "{isa:?} {name}");
                }
            }
        }
    });
}

#[test]
fn batches_siblings_and_threads_change_nothing() {
    let (one, two) = (Pool::new(1), Pool::new(2));
    each_case(0xBA7C4, |r, c, d, k, activations, name| {
        let mut scratch = Scratch::default();
        scratch.set_activations(activations);
        for isa in Isa::available().into_iter().filter(|i| *i != Isa::Scalar) {
            for m in [1, 2, 5, 12, 13, 24, 31] {
                let x = Tensor::from_vec(m, k, (0..m * k).map(|_| r.unit()).collect());
                let (mut y, mut z, mut other) = Default::default();
                linear_on(isa, &one, &x, &mut [(&c.linear, &mut y)], &mut scratch);
                let jobs = &mut [(&d.linear, &mut other), (&c.linear, &mut z)];
                linear_on(isa, &two, &x, jobs, &mut scratch);
                assert_eq!(y.as_slice(), z.as_slice(), "threads or siblings, {isa:?} {name}");
                let last = Tensor::from_vec(1, k, x.row(m - 1).to_vec());
                linear_on(isa, &one, &last, &mut [(&c.linear, &mut z)], &mut scratch);
                assert_eq!(y.row(m - 1), z.row(0), "batch of {m}, {isa:?} {name}");
            }
        }
    });
}

/// The layers of a stage may be stored in different blocks, or one in blocks and one by GPTQ.
#[test]
fn siblings_of_other_layouts_and_headers_do_not_mix() {
    let (mut r, pool) = (Random(0xD1FF), Pool::new(2));
    let (k, n) = (160, 70);
    let mut cases: Vec<Case> = BLOCKS.map(|format| block_case(&mut r, k, n, format)).into();
    cases.push(case(&mut r, 4, k, n, 32, false, false));
    cases.push(case(&mut r, 8, k, n, 32, false, true));
    for activations in [Activations::F32, Activations::Bf16, Activations::Int8] {
        let mut scratch = Scratch::default();
        scratch.set_activations(activations);
        for isa in Isa::available() {
            for m in [1, 7] {
                let x = Tensor::from_vec(m, k, (0..m * k).map(|_| r.unit()).collect());
                let mut alone = Tensor::default();
                let mut together: Vec<Tensor> = cases.iter().map(|_| Tensor::default()).collect();
                let mut jobs: Vec<_> =
                    cases.iter().zip(&mut together).map(|(c, y)| (&c.linear, y)).collect();
                linear_on(isa, &pool, &x, &mut jobs, &mut scratch);
                for (index, (c, y)) in cases.iter().zip(&together).enumerate() {
                    linear_on(isa, &pool, &x, &mut [(&c.linear, &mut alone)], &mut scratch);
                    assert_eq!(alone.as_slice(), y.as_slice(), "{isa:?} {activations:?} {index}");
                }
            }
        }
    }
}

/// More tokens than a task takes.
#[test]
fn many_tokens_are_cut_into_pieces() {
    let (mut r, pool) = (Random(0xF00D), Pool::new(2));
    let (k, n) = (544, 70);
    for bits in [3, 4] {
        let c = case(&mut r, bits, k, n, 128, false, false);
        let m = 280;
        let x = Tensor::from_vec(m, k, (0..m * k).map(|_| r.unit()).collect());
        let mut scratch = Scratch::default();
        scratch.set_activations(Activations::Int8);
        for isa in Isa::available().into_iter().filter(|i| *i != Isa::Scalar) {
            let (mut y, mut z) = Default::default();
            linear_on(isa, &pool, &x, &mut [(&c.linear, &mut y)], &mut scratch);
            for i in [0, 100, m - 1] {
                let one = Tensor::from_vec(1, k, x.row(i).to_vec());
                linear_on(isa, &pool, &one, &mut [(&c.linear, &mut z)], &mut scratch);
                assert_eq!(y.row(i), z.row(0), "{isa:?} {bits} bits, row {i}");
            }
        }
    }
}

#[test]
fn extreme_inputs_as_integers() {
    let mut r = Random(0xE17);
    let (k, n) = (128, 64);
    let c = case(&mut r, 4, k, n, 64, false, true);
    let mut scratch = Scratch::default();
    let int8 = Isa::available().into_iter().map(|isa| (isa, Activations::Int8));
    let int16 = Isa::available().into_iter().filter(|&isa| pairs(isa) == Some(Pairs::Int16));
    for (isa, activations) in int8.chain(int16.map(|isa| (isa, Activations::Bf16))) {
        scratch.set_activations(activations);
        let mut run = |x: Vec<f32>| {
            let mut y = Tensor::default();
            let x = Tensor::from_vec(1, k, x);
            linear_on(isa, &Pool::new(1), &x, &mut [(&c.linear, &mut y)], &mut scratch);
            y.as_slice().to_vec()
        };
        let bias = c.linear.bias.clone().unwrap();
        assert_eq!(run(vec![0.0; k]), bias, "{isa:?}");
        assert_eq!(run(vec![1e-40; k]), bias, "{isa:?}");
        // What is not a number stays visible.
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5; k];
            x[70] = bad;
            assert!(run(x).iter().all(|y| !y.is_finite()), "{isa:?} {bad}");
        }
    }
}

/// What `g_idx` points at may leave groups out.
#[test]
fn groups_without_inputs_add_nothing() {
    let (k, n) = (64, 3);
    let parts = |scales, zeros, g_idx| GptqParts {
        bits: 4,
        in_features: k,
        out_features: n,
        qweight: &[0x1234_5678; 24],
        scales,
        zeros,
        g_idx,
    };
    let linear = |parts| Linear {
        weight: Matrix::Quantized(QuantizedMatrix::from_gptq(parts).unwrap()),
        bias: None,
    };
    let (scales, zeros) = ([f16::from_f32(0.25); 9], [5; 9]);
    let one = linear(parts(&scales[..n], &zeros[..n], &[0; 64]));
    let two = linear(parts(&scales, &zeros, &[1; 64]));
    let mut scratch = Scratch::default();
    for activations in [Activations::F32, Activations::Bf16, Activations::Int8] {
        scratch.set_activations(activations);
        for isa in Isa::available() {
            for m in [1, 5] {
                let x = Tensor::from_vec(m, k, (0..m * k).map(|i| i as f32 / 64.0).collect());
                let (mut y, mut z) = Default::default();
                linear_on(isa, &Pool::new(1), &x, &mut [(&one, &mut y)], &mut scratch);
                linear_on(isa, &Pool::new(1), &x, &mut [(&two, &mut z)], &mut scratch);
                assert_eq!(y.as_slice(), z.as_slice(), "{isa:?} {activations:?}");
            }
        }
    }
}

/// The largest sums that integers can have are still exact.
#[test]
fn sums_of_large_integers_do_not_overflow() {
    let (k, n) = (256, 64);
    for bits in [2, 3, 4, 8] {
        let largest = ((1 << bits) - 1) as u8;
        let centre = 1 << (bits - 1);
        for (code, zero) in [(largest, 0), (0, largest), (largest, centre), (0, centre)] {
            let parts = GptqParts {
                bits,
                in_features: k,
                out_features: n,
                // All bits are the same.
                qweight: &vec![if code > 0 { u32::MAX } else { 0 }; k * bits as usize / 32 * n],
                scales: &vec![f16::ONE; n],
                zeros: &vec![zero; n],
                g_idx: &vec![0; k],
            };
            let weight = Matrix::Quantized(QuantizedMatrix::from_gptq(parts).unwrap());
            let linear = Linear { weight, bias: None };
            for (activations, x) in [Activations::Bf16, Activations::Int8]
                .into_iter()
                .flat_map(|activations| [(activations, 1.0f32), (activations, -1.0)])
            {
                let mut scratch = Scratch::default();
                scratch.set_activations(activations);
                let want = x * k as f32 * (f32::from(code) - f32::from(zero));
                for isa in Isa::available() {
                    let (x, mut y) = (Tensor::from_vec(1, k, vec![x; k]), Tensor::default());
                    linear_on(isa, &Pool::new(1), &x, &mut [(&linear, &mut y)], &mut scratch);
                    let near = |y: &f32| (y - want).abs() <= 1e-5 * k as f32 * f32::from(largest);
                    let name = format!("{isa:?} {activations:?} {bits} {code} {zero}");
                    assert!(y.as_slice().iter().all(near), "{name} {:?}", y.row(0)[0]);
                }
            }
        }
    }
}

#[test]
fn malformed_parts_are_refused() {
    let parts = GptqParts {
        bits: 4,
        in_features: 8,
        out_features: 2,
        qweight: &[0, 0],
        scales: &[f16::ONE; 2],
        zeros: &[8, 8],
        g_idx: &[0; 8],
    };
    assert!(QuantizedMatrix::from_gptq(parts).is_ok());
    assert!(QuantizedMatrix::from_gptq(GptqParts { bits: 5, ..parts }).is_err());
    assert!(QuantizedMatrix::from_gptq(GptqParts { qweight: &[0], ..parts }).is_err());
    assert!(
        QuantizedMatrix::from_gptq(GptqParts { g_idx: &[0, 0, 0, 0, 0, 0, 0, 1], ..parts })
            .is_err()
    );
    assert!(QuantizedMatrix::from_gptq(GptqParts { in_features: 6, ..parts }).is_err());
    assert!(QuantizedMatrix::from_gptq(GptqParts { out_features: 0, ..parts }).is_err());
}
