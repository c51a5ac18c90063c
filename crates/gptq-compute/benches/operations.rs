//! What a step does besides its products, in the shape of a 1.1 B model, for one token and for a prompt
//! of 512. `cargo bench -p gptq-compute --bench operations`. Rates count the floats that are read and
//! written; the machine's limits are printed by the other benchmark.

#![allow(missing_docs)] // A program.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use gptq_compute::{
    Activation, KvType, LayerKv, Norm, NormKind, Pool, RopeStyle, RopeTable, Tensor,
    activate_gated, add_norm, add_scaled, argmax, cross_entropy, norm, rope,
};

const TOKENS: [usize; 2] = [1, 512];
const HIDDEN: usize = 2048;
const MLP: usize = 5632;
const HEAD: usize = 64;
const KV_HEADS: usize = 4;

fn main() {
    divan::main();
}

fn tensor(rows: usize, cols: usize) -> Tensor {
    Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i % 13) as f32 - 6.0).collect())
}

fn rms() -> Norm {
    Norm { kind: NormKind::Rms, weight: Some(vec![1.0; HIDDEN]), bias: None, eps: 1e-5 }
}

fn bytes(floats: usize) -> BytesCount {
    BytesCount::of_many::<f32>(floats)
}

#[divan::bench(args = TOKENS)]
fn rms_norm(bencher: Bencher, tokens: usize) {
    let (pool, x, n, mut out) =
        (Pool::with_all_cores(), tensor(tokens, HIDDEN), rms(), Tensor::default());
    bencher.counter(bytes(2 * tokens * HIDDEN)).bench_local(|| norm(&pool, &x, &n, &mut out));
}

#[divan::bench(args = TOKENS)]
fn residual_and_rms_norm(bencher: Bencher, tokens: usize) {
    let (pool, mut x, y, n, mut out) = (
        Pool::with_all_cores(),
        tensor(tokens, HIDDEN),
        tensor(tokens, HIDDEN),
        rms(),
        Tensor::default(),
    );
    let count = bytes(4 * tokens * HIDDEN);
    bencher.counter(count).bench_local(|| add_norm(&pool, &mut x, &y, 1e-9, &n, &mut out));
}

#[divan::bench(args = TOKENS)]
fn residual(bencher: Bencher, tokens: usize) {
    let (pool, mut x, y) = (Pool::with_all_cores(), tensor(tokens, HIDDEN), tensor(tokens, HIDDEN));
    let count = bytes(3 * tokens * HIDDEN);
    bencher.counter(count).bench_local(|| add_scaled(&pool, &mut x, &y, 1e-9));
}

#[divan::bench(args = TOKENS)]
fn silu_and_product(bencher: Bencher, tokens: usize) {
    let (pool, up) = (Pool::with_all_cores(), tensor(tokens, MLP));
    bencher
        .counter(bytes(3 * tokens * MLP))
        .with_inputs(|| tensor(tokens, MLP))
        .bench_local_refs(|gate| activate_gated(&pool, Activation::Silu, gate, &up));
}

#[divan::bench(args = TOKENS)]
fn rotation(bencher: Bencher, tokens: usize) {
    let pool = Pool::with_all_cores();
    let frequencies: Vec<f32> = (0..HEAD / 2).map(|i| 0.8f32.powi(i as i32)).collect();
    let table = RopeTable::new(&frequencies, 1.0, RopeStyle::Half, 0..tokens);
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let mut q = tensor(tokens, HIDDEN);
    let count = bytes(2 * tokens * HIDDEN);
    bencher.counter(count).bench_local(|| rope(&pool, &mut q, HEAD, &table, &positions));
}

#[divan::bench(args = TOKENS, consts = [0, 1])]
fn append_to_the_cache<const INT8: usize>(bencher: Bencher, tokens: usize) {
    let kind = [KvType::F16, KvType::Int8][INT8];
    let x = tensor(tokens, KV_HEADS * HEAD);
    let mut kv = LayerKv::with_type(KV_HEADS, HEAD, kind);
    bencher.counter(bytes(2 * tokens * KV_HEADS * HEAD)).bench_local(|| {
        kv.clear();
        kv.append(&x, &x, 0..tokens);
    });
}

#[divan::bench]
fn largest_logit(bencher: Bencher) {
    let logits = tensor(1, 32_000);
    bencher.counter(bytes(32_000)).bench_local(|| argmax(black_box(logits.row(0))));
}

#[divan::bench]
fn likelihood(bencher: Bencher) {
    let (pool, logits) = (Pool::with_all_cores(), tensor(64, 32_000));
    let targets = [5; 64];
    let count = bytes(64 * 32_000);
    bencher.counter(count).bench_local(|| cross_entropy(&pool, &logits, &targets));
}
