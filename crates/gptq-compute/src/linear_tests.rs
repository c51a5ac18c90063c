//! Properties of quantized products: every instruction set, width, group, tail and batch against
//! an oracle in f64.

use half::f16;

use crate::arch::Isa;
use crate::linear::linear_on;
use crate::{GptqParts, Linear, Matrix, Pool, QuantizedMatrix, Scratch, Tensor};

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
    let scales: Vec<f16> =
        (0..groups * n).map(|_| f16::from_f32(0.01 + 0.1 * r.unit().abs())).collect();
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
    Case { linear: Linear { weight, bias: Some((0..n).map(|_| r.unit()).collect()) }, dense }
}

#[test]
fn all_widths_groups_tails_and_batches() {
    let seed = 0x5EED_CAFE;
    let mut r = Random(seed);
    let (one, two) = (Pool::new(1), Pool::new(2));
    let mut scratch = Scratch::default();
    for bits in [2, 3, 4, 8] {
        for (k, n, group) in
            [(32, 1, 8), (96, 40, 64), (160, 33, 24), (576, 16, 128), (64, 100, 64), (128, 67, 16)]
        {
            for (act_order, sym) in [(false, true), (false, false), (true, false), (true, true)] {
                let c = case(&mut r, bits, k, n, group, act_order, sym);
                let d = case(&mut r, bits, k, 2 * n, group, act_order, !sym);
                for m in [1, 2, 3, 5, 12, 13, 31, 110] {
                    let x = Tensor::from_vec(m, k, (0..m * k).map(|_| r.unit()).collect());
                    for isa in Isa::available() {
                        let (mut y, mut z, mut other) = Default::default();
                        linear_on(isa, &one, &x, &mut [(&c.linear, &mut y)], &mut scratch);
                        let jobs = &mut [(&d.linear, &mut other), (&c.linear, &mut z)];
                        linear_on(isa, &two, &x, jobs, &mut scratch);
                        assert_eq!(
                            y.as_slice(),
                            z.as_slice(),
                            "threads or siblings change results"
                        );
                        // A row does not depend on its batch.
                        let last = Tensor::from_vec(1, k, x.row(m - 1).to_vec());
                        linear_on(isa, &one, &last, &mut [(&c.linear, &mut z)], &mut scratch);
                        assert_eq!(y.row(m - 1), z.row(0), "{isa:?} {bits} {k} {n} {group} {m}");
                        let bias = c.linear.bias.as_ref().unwrap();
                        for i in [0, m / 2, m - 1] {
                            for j in 0..n {
                                let terms = (0..k).map(|l| {
                                    f64::from(x.row(i)[l]) * f64::from(c.dense[j * k + l])
                                });
                                let want = terms.clone().sum::<f64>() + f64::from(bias[j]);
                                // f32 sums of k terms of this size; codes are summed before
                                // the zero point is taken out, hence the factor.
                                let size: f64 = terms.map(f64::abs).sum::<f64>() + 1.0;
                                let got = f64::from(y.row(i)[j]);
                                assert!(
                                    (got - want).abs() < 4e-6 * size,
                                    "{isa:?} {bits} bits {k}x{n} g{group} m{m}: {got} {want}, seed {seed:x}"
                                );
                            }
                        }
                    }
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
