use super::*;

fn value(i: usize) -> f32 {
    ((i * 7919 % 2003) as f32 - 1000.0) / 700.0
}

fn oracle(q: &Tensor, row: usize, k: &Tensor, v: &Tensor, pos: usize, p: &AttnParams) -> Vec<f64> {
    let (d, group) = (p.head_dim, p.heads / p.kv_heads);
    let mut out = Vec::new();
    for h in 0..p.heads {
        let kv = h / group;
        let range = visible(p, pos, k.rows());
        let mut scores: Vec<f64> = range
            .clone()
            .map(|t| {
                let dot: f64 = (0..d)
                    .map(|i| f64::from(q.row(row)[h * d + i]) * f64::from(k.row(t)[kv * d + i]))
                    .sum();
                let mut s = dot * f64::from(p.scale);
                if let Some(c) = p.soft_cap {
                    s = f64::from(c) * (s / f64::from(c)).tanh();
                }
                if let Some(a) = &p.alibi {
                    s += f64::from(a[h]) * (t as f64 - pos as f64);
                }
                s
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for s in &mut scores {
            *s = (*s - max).exp();
        }
        let sum: f64 = scores.iter().sum();
        for i in 0..d {
            let dot: f64 =
                range.clone().zip(&scores).map(|(t, s)| s * f64::from(v.row(t)[kv * d + i])).sum();
            out.push(dot / sum);
        }
    }
    out
}

/// All that this processor has.
fn kinds() -> Vec<KvType> {
    let mut kinds = vec![KvType::F32, KvType::F16, KvType::Int8];
    kinds.extend((KvType::rounding() != KvType::F32).then_some(KvType::rounding()));
    kinds
}

/// What a cache of `kind` keeps of `x`, head by head.
fn stored(x: &Tensor, head_dim: usize, kind: KvType) -> Tensor {
    let mut out = x.clone();
    for head in out.as_mut_slice().chunks_exact_mut(head_dim) {
        let most = head.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let code = |v: f32, limit: f32| (v * (limit / most)).round_ties_even() * (most / limit);
        for v in head {
            *v = match kind {
                KvType::F32 => *v,
                KvType::F16 => half::f16::from_f32(*v).to_f32(),
                KvType::Int8 => code(*v, 127.0),
                KvType::Bf16 => half::bf16::from_f32(*v).to_f32(),
                KvType::Int16 => code(*v, cache::largest(head_dim)),
            };
        }
    }
    out
}

fn tensor(rows: usize, cols: usize, seed: usize) -> Tensor {
    Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| value(i + seed)).collect())
}

fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> AttnParams {
    AttnParams {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        causal: true,
        window: None,
        soft_cap: None,
        alibi: None,
    }
}

#[test]
fn matches_f64_for_prefill_and_decode() {
    let (one, three) = (Pool::new(1), Pool::new(3));
    for (heads, kv_heads, head_dim) in [
        (9, 3, 64),
        (4, 4, 24),
        (2, 1, 128),
        (3, 1, 80),
        (32, 1, 16),
        (2, 2, 256),
        (8, 1, 32),
        (3, 1, 17),
    ] {
        for (len, past, window, soft_cap, alibi, causal) in [
            (150, 0, None, None, false, true),
            (70, 69, None, None, true, true),
            (133, 100, Some(8), Some(3.0), false, true),
            (65, 1, Some(70), None, true, true),
            (40, 0, None, None, false, false),
            (150, 0, Some(30), None, false, false),
            (700, 699, None, None, false, true),
            (700, 640, Some(300), None, true, true),
            (520, 515, None, Some(2.0), false, true),
        ] {
            let p = AttnParams {
                causal,
                window,
                soft_cap,
                alibi: alibi.then(|| (0..heads).map(|h| 0.1 / (h + 1) as f32).collect()),
                ..plain(heads, kv_heads, head_dim)
            };
            let (k, v) = (tensor(len, kv_heads * head_dim, 1), tensor(len, kv_heads * head_dim, 2));
            let q = tensor(len - past + 3, heads * head_dim, 3);
            for kind in kinds() {
                let mut kv = LayerKv::with_type(kv_heads, head_dim, kind);
                kv.append(&k, &v, 0..past);
                kv.append(&k, &v, past..len);
                let spans = [AttnSpan { rows: 3..q.rows(), kv: &kv }];
                let (mut out, mut again) = (Tensor::default(), Tensor::default());
                attention(&one, &q, &spans, &p, &mut out);
                attention(&three, &q, &spans, &p, &mut again);
                assert_eq!(out.as_slice()[3 * q.cols()..], again.as_slice()[3 * q.cols()..]);
                // The oracle reads the rounded keys and values, so that what is left is the rounding
                // of f32 arithmetic, whatever the storage.
                let (k, v) = (stored(&k, head_dim, kind), stored(&v, head_dim, kind));
                // Queries are rounded in pairs, too. The weights, which add up to one, are by 2⁻⁹ of themselves
                // at most for bfloat16, and values are below 1.5. Integers are off by half of 1/5792 of the
                // largest of a chunk, of which hundreds add up at random here.
                let (q, limit) = match kind {
                    KvType::Bf16 => (stored(&q, head_dim, kind), 3e-3),
                    KvType::Int16 => (stored(&q, head_dim, kind), 1e-3),
                    _ => (q.clone(), 1e-5),
                };
                for row in (3..q.rows()).step_by(11) {
                    let want = oracle(&q, row, &k, &v, past + row - 3, &p);
                    for (y, t) in out.row(row).iter().zip(want) {
                        let error = (f64::from(*y) - t).abs();
                        assert!(error < limit, "{kind:?} {heads} {head_dim} {len} {row}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_has_one_result_however_it_comes() {
    // Prefill, token by token, and with windows that begin inside a chunk: to the bit.
    let pool = Pool::new(2);
    let len = 600;
    let (q, k, v) = (tensor(len, 6 * 32, 1), tensor(len, 64, 2), tensor(len, 64, 3));
    let other = KvType::rounding();
    for (kind, window) in
        [(KvType::F16, None), (KvType::Int8, Some(270)), (KvType::F32, Some(40)), (other, None)]
    {
        let p = AttnParams { window, ..plain(6, 2, 32) };
        let (mut all, mut some) = (Tensor::default(), Tensor::default());
        let mut kv = LayerKv::with_type(2, 32, kind);
        kv.append(&k, &v, 0..len);
        attention(&pool, &q, &[AttnSpan { rows: 0..len, kv: &kv }], &p, &mut all);
        let mut at = 64;
        kv.truncate(at + 7);
        kv.truncate(at);
        for tokens in [186, 1, 3, 4, 1, 300, 1, 1, 39] {
            kv.append(&k, &v, at..at + tokens);
            attention(&pool, &q, &[AttnSpan { rows: at..at + tokens, kv: &kv }], &p, &mut some);
            for row in at..at + tokens {
                assert_eq!(some.row(row), all.row(row), "{kind:?} {row}");
            }
            at += tokens;
        }
        assert_eq!(at, len);
    }
}

#[test]
fn memory_grows_with_the_positions() {
    let x = tensor(130, 48, 5);
    for kind in kinds() {
        let mut kv = LayerKv::with_type(2, 24, kind);
        assert_eq!(kv.bytes(), 0);
        kv.append(&x, &x, 0..130);
        assert_eq!(kv.bytes(), 3 * 64 * kind.bytes_per_token(2, 24));
    }
    // Keys of 24 columns and values of 32, and two scales of four bytes.
    assert_eq!(KvType::F16.bytes_per_token(2, 24), 2 * 2 * 56);
    assert_eq!(KvType::Int8.bytes_per_token(2, 24), 2 * (56 + 8));
}

#[test]
fn extreme_values_stay_numbers() {
    let pool = Pool::new(1);
    let p = plain(1, 1, 16);
    let q = Tensor::from_vec(1, 16, vec![1.0; 16]);
    let k = Tensor::from_vec(2, 16, [vec![1e6; 16], vec![0.0; 16]].concat());
    for kind in kinds() {
        let mut kv = LayerKv::with_type(1, 16, kind);
        kv.append(&k, &k, 0..2);
        let mut out = Tensor::default();
        attention(&pool, &q, &[AttnSpan { rows: 0..1, kv: &kv }], &p, &mut out);
        // All the weight is on the large key; f16 holds it as its largest number.
        let want = match kind {
            KvType::F16 => 65504.0,
            KvType::Bf16 => half::bf16::from_f32(1e6).to_f32(),
            _ => 1e6,
        };
        assert!(out.as_slice().iter().all(|y| (y - want).abs() < 1.0), "{kind:?}");
    }
}

#[test]
fn what_is_no_number_shows() {
    let pool = Pool::new(1);
    let p = plain(2, 1, 24);
    let x = tensor(40, 48, 1);
    for kind in kinds() {
        for (place, bad) in [(0, f32::NAN), (1, f32::NAN), (2, f32::NAN), (2, f32::INFINITY)] {
            if kind == KvType::F16 && bad.is_infinite() {
                continue;
            }
            let mut inputs = [x.clone(), tensor(40, 24, 2), tensor(40, 24, 3)];
            inputs[place].row_mut(17)[7] = bad;
            let [q, k, v] = inputs;
            let mut kv = LayerKv::with_type(1, 24, kind);
            kv.append(&k, &v, 0..40);
            let mut out = Tensor::default();
            attention(&pool, &q, &[AttnSpan { rows: 0..40, kv: &kv }], &p, &mut out);
            assert!(out.row(17).iter().any(|y| !y.is_finite()), "{kind:?} {place} {bad}");
            // What was forgotten does not show.
            kv.truncate(17);
            attention(&pool, &x, &[AttnSpan { rows: 0..17, kv: &kv }], &p, &mut out);
            assert!(out.as_slice()[..17 * x.cols()].iter().all(|y| y.is_finite()), "{kind:?}");
        }
    }
}

#[test]
#[should_panic(expected = "spans overlap")]
fn spans_that_overlap_are_refused() {
    let mut kv = LayerKv::new(1, 16);
    let x = tensor(8, 16, 1);
    kv.append(&x, &x, 0..8);
    let spans = [AttnSpan { rows: 0..8, kv: &kv }, AttnSpan { rows: 0..8, kv: &kv }];
    attention(&Pool::new(2), &x, &spans, &plain(1, 1, 16), &mut Tensor::default());
}

#[test]
fn spans_do_not_see_each_other() {
    let pool = Pool::new(2);
    let p = AttnParams {
        heads: 2,
        kv_heads: 2,
        head_dim: 16,
        scale: 0.25,
        causal: true,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let x = Tensor::from_vec(70, 32, (0..70 * 32).map(value).collect());
    let run = |splits: &[Range<usize>]| {
        let caches: Vec<LayerKv> = splits
            .iter()
            .map(|r| {
                let mut kv = LayerKv::new(2, 16);
                kv.append(&x, &x, r.clone());
                kv
            })
            .collect();
        let spans: Vec<_> =
            splits.iter().zip(&caches).map(|(r, kv)| AttnSpan { rows: r.clone(), kv }).collect();
        let mut out = Tensor::default();
        attention(&pool, &x, &spans, &p, &mut out);
        out
    };
    let (both, first) = (run(&[0..30, 30..70]), run(std::slice::from_ref(&(0..30))));
    assert_eq!(both.as_slice()[..30 * 32], first.as_slice()[..30 * 32]);
    // The first token of a sequence sees only itself.
    assert_eq!(both.row(30), x.row(30));
}
