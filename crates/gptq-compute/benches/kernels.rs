//! Rates of the kernels in the shapes of SmolLM2-135M and of a 1.1 B model, as a fraction of the
//! f32 product rate measured in the same run. `cargo bench -p gptq-compute [FILTER]`.

#![allow(clippy::print_stdout, missing_docs)] // A report is what this program is for.

use std::time::Instant;

use gptq_compute::{
    AttnParams, AttnSpan, DenseMatrix, GptqParts, Gram, LayerKv, Linear, Matrix, Pool,
    QuantizedMatrix, Scratch, Tensor, attention, cholesky::inverse_factor, gemm_nt, gemm_peak_rate,
    linear,
};
use half::f16;

/// Median seconds of several runs.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let mut runs: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    runs[3]
}

fn quantized(bits: u32, k: usize, n: usize, group: usize) -> Linear {
    let groups = k / group;
    let qweight: Vec<u32> =
        (0..k * bits as usize / 32 * n).map(|i| (i as u32).wrapping_mul(0x9E37_79B9)).collect();
    let parts = GptqParts {
        bits,
        in_features: k,
        out_features: n,
        qweight: &qweight,
        scales: &vec![f16::from_f32(0.01); groups * n],
        zeros: &vec![1 << (bits - 1); groups * n],
        g_idx: &(0..k as u32).map(|i| i / group as u32).collect::<Vec<_>>(),
    };
    let weight = QuantizedMatrix::from_gptq(parts).expect("valid parts");
    Linear { weight: Matrix::Quantized(weight), bias: None }
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let pool = Pool::with_all_cores();
    let peak = gemm_peak_rate(&pool, 1536);
    println!("{} threads, f32 product {:.0} GFLOP/s", pool.threads(), peak / 1e9);
    let report = |name: String, flops: f64, bytes: f64, run: &mut dyn FnMut()| {
        if name.contains(&filter) {
            let s = time(run);
            println!(
                "{name:32} {:9.3} ms {:7.1} GFLOP/s {:5.2} of product {:6.1} GB/s",
                s * 1e3,
                flops / s / 1e9,
                flops / s / peak,
                bytes / s / 1e9
            );
        }
    };
    let mut scratch = Scratch::default();
    for (m, k, n) in [(2048, 576, 576), (2048, 576, 1536), (2048, 1536, 576), (512, 2048, 5632)] {
        let x = Tensor::from_vec(m, k, (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect());
        let w = DenseMatrix::from_f32(n, k, vec![0.5; n * k]);
        let mut y = Tensor::default();
        let flops = 2.0 * (m * k * n) as f64;
        report(format!("dense f32 {m}x{k}x{n}"), flops, 0.0, &mut || {
            gemm_nt(&pool, &x, &w, None, &mut y);
        });
        for bits in [2, 3, 4, 8] {
            let l = quantized(bits, k, n, 64);
            report(format!("linear {bits} bit {m}x{k}x{n}"), flops, 0.0, &mut || {
                linear(&pool, &x, &mut [(&l, &mut y)], &mut scratch);
            });
        }
        report(format!("gram {m}x{k}"), (m * k * k) as f64, 0.0, &mut || {
            Gram::new(k).accumulate(&pool, &x);
        });
    }
    for bits in [2, 3, 4, 8] {
        for m in [1, 4, 8, 16] {
            let (k, n) = (2048, 5632);
            // Enough matrices that none stays in a cache.
            let ls: Vec<Linear> = (0..24).map(|_| quantized(bits, k, n, 128)).collect();
            let x = Tensor::from_vec(m, k, (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect());
            let mut y = Tensor::default();
            let bytes: usize = ls.iter().map(|l| l.weight.bytes()).sum();
            let flops = 2.0 * (24 * m * k * n) as f64;
            report(format!("decode {bits} bit m={m} {k}x{n}"), flops, bytes as f64, &mut || {
                for l in &ls {
                    linear(&pool, &x, &mut [(l, &mut y)], &mut scratch);
                }
            });
        }
    }
    let p = AttnParams {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        causal: true,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let (q, k) = (Tensor::zeros(2048, 576), Tensor::zeros(2048, 192));
    let mut kv = LayerKv::new(3, 64);
    kv.append(&k, &k, 0..2048);
    let mut out = Tensor::default();
    report("attention 2048".into(), 2.0 * 2048.0 * 2048.0 * 576.0, 0.0, &mut || {
        attention(&pool, &q, &[AttnSpan { rows: 0..2048, kv: &kv }], &p, &mut out);
    });
    for n in [576, 1536] {
        let mut h = vec![0.1; n * n];
        (0..n).for_each(|i| h[i * n + i] = 1.0);
        report(format!("inverse factor {n}"), 2.0 / 3.0 * (n * n * n) as f64, 0.0, &mut || {
            inverse_factor(h.clone(), n).expect("positive definite");
        });
    }
}
