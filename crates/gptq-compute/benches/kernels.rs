//! Rates of the kernels in the shapes of SmolLM2-135M and of a 1.1 B model, beside the limits of
//! the machine measured in the same run. `cargo bench -p gptq-compute [FILTER]`.
//!
//! Times are the best of many short runs, which other load on the machine disturbs least.
//! Quantized matrices take turns, so that their codes come from memory and not from a cache.

#![allow(clippy::print_stdout, missing_docs)] // A report is what this program is for.

use std::time::Instant;

use gptq_compute::{
    Activations, AttnParams, AttnSpan, BandwidthProbe, DenseMatrix, GptqParts, Gram, KvMemory,
    KvType, LayerKv, Linear, Matrix, Pool, QuantizedMatrix, Scratch, Tensor, attention,
    cholesky::inverse_factor, gemm_nt, gemm_peak_rate, int8_peak_rate, linear,
};
use half::f16;

/// More than the third level caches hold, in bytes.
const BEYOND_CACHES: usize = 160 << 20;

/// Best seconds of some runs.
fn time(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let run = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(run).fold(f64::INFINITY, f64::min)
}

fn quantized(pool: &Pool, bits: u32, k: usize, n: usize, group: usize) -> Linear {
    let groups = k.div_ceil(group);
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
    let weight = QuantizedMatrix::from_gptq_on(pool, parts).expect("valid parts");
    Linear { weight: Matrix::Quantized(weight), bias: None }
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let pool = Pool::with_all_cores();
    let probe = BandwidthProbe::new(0);
    let bandwidth = (0..5).map(|_| probe.measure(&pool)).fold(0.0, f64::max);
    drop(probe);
    let (peak, int8) = (gemm_peak_rate(&pool, 1536), int8_peak_rate(&pool));
    println!(
        "{} threads, {:?}: f32 product {:.0} GFLOP/s, int8 in registers {:.0} GOP/s, reads {:.1} GB/s",
        pool.threads(),
        gptq_compute::arch::isa(),
        peak / 1e9,
        int8 / 1e9,
        bandwidth / 1e9
    );
    let report =
        |name: String, flops: f64, bytes: f64, limit: f64, runs: usize, run: &mut dyn FnMut()| {
            if name.contains(&filter) {
                let s = time(runs, run);
                println!(
                    "{name:36} {:9.3} ms {:7.1} GOP/s {:5.2} of peak {:6.1} GB/s {:5.2} of reads",
                    s * 1e3,
                    flops / s / 1e9,
                    flops / s / limit,
                    bytes / s / 1e9,
                    bytes / s / bandwidth
                );
            }
        };
    let input = |m: usize, k: usize| {
        Tensor::from_vec(m, k, (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect())
    };
    let mut scratch = Scratch::default();
    for bits in [2, 3, 4, 8] {
        for (k, n) in [(2048, 2048), (2048, 5632), (5632, 2048), (576, 1536)] {
            let count = BEYOND_CACHES / (k * n * bits as usize / 8) + 1;
            let mut layers: Vec<Linear> = Vec::new();
            for m in [1, 4, 8, 16, 64, 512] {
                let modes = [Activations::Int8, Activations::Bf16, Activations::F32];
                for (mode, limit) in
                    modes.map(|m| (m, if m == Activations::Int8 { int8 } else { peak }))
                {
                    let name = format!("linear {bits} bit {mode:?} {m}x{k}x{n}");
                    if !name.contains(&filter) {
                        continue;
                    }
                    layers.resize_with(count, || quantized(&pool, bits, k, n, 128));
                    scratch.set_activations(mode);
                    let (x, mut y) = (input(m, k), Tensor::default());
                    let bytes = layers[0].weight.bytes() as f64;
                    let mut turn = 0;
                    let runs = if m < 512 { 2 * count } else { 20 };
                    report(name, 2.0 * (m * k * n) as f64, bytes, limit, runs, &mut || {
                        turn = (turn + 1) % count;
                        linear(&pool, &x, &mut [(&layers[turn], &mut y)], &mut scratch);
                    });
                }
            }
        }
    }
    for (m, k, n) in [(2048, 576, 576), (2048, 576, 1536), (2048, 1536, 576), (512, 2048, 5632)] {
        let x = input(m, k);
        let w = DenseMatrix::from_f32(n, k, vec![0.5; n * k]);
        let mut y = Tensor::default();
        let flops = 2.0 * (m * k * n) as f64;
        report(format!("dense f32 {m}x{k}x{n}"), flops, 0.0, peak, 7, &mut || {
            gemm_nt(&pool, &x, &w, None, &mut y);
        });
        let rounding = w.clone().rounding(&pool);
        report(format!("dense 16 bits {m}x{k}x{n}"), flops, 0.0, peak, 7, &mut || {
            gemm_nt(&pool, &x, &rounding, None, &mut y);
        });
        report(format!("gram {m}x{k}"), (m * k * k) as f64, 0.0, peak, 7, &mut || {
            Gram::new(k).accumulate(&pool, &x);
        });
        report(format!("gram 16 bits {m}x{k}"), (m * k * k) as f64, 0.0, peak, 7, &mut || {
            Gram::rounding(k).accumulate(&pool, &x);
        });
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
    report("attention 2048".into(), 2.0 * 2048.0 * 2048.0 * 576.0, 0.0, peak, 7, &mut || {
        attention(&pool, &q, &[AttnSpan { rows: 0..2048, kv: &kv }], &p, &mut out);
    });
    // One token, in the shape of a 1.1 B model: caches take turns, as those of its layers do.
    for (positions, kind) in [(512, KvType::F16), (2048, KvType::F16), (2048, KvType::Int8)] {
        let name = format!("attention decode {kind:?} {positions}");
        if !name.contains(&filter) {
            continue;
        }
        let p = AttnParams { heads: 32, kv_heads: 4, head_dim: 64, ..p.clone() };
        let (q, k) = (input(1, 2048), input(positions, 256));
        let bytes = kind.bytes_per_token(4, 64) * positions;
        let memory = KvMemory::default();
        let layer = |_| {
            let mut kv = LayerKv::sharing(&memory, 4, 64, kind);
            kv.append(&k, &k, 0..positions);
            kv
        };
        let layers: Vec<LayerKv> = (0..=BEYOND_CACHES / bytes).map(layer).collect();
        let flops = 4.0 * positions as f64 * 2048.0;
        let mut turn = 0;
        report(name, flops, bytes as f64, peak, 2 * layers.len(), &mut || {
            turn = (turn + 1) % layers.len();
            attention(&pool, &q, &[AttnSpan { rows: 0..1, kv: &layers[turn] }], &p, &mut out);
        });
    }
    for n in [576, 1536] {
        let mut h = vec![0.1; n * n];
        (0..n).for_each(|i| h[i * n + i] = 1.0);
        let flops = 2.0 / 3.0 * (n * n * n) as f64;
        report(format!("inverse factor {n}"), flops, 0.0, peak, 7, &mut || {
            inverse_factor(h.clone(), n).expect("positive definite");
        });
    }
}
