//! Activation functions of the feed-forward part.

use crate::arch::{LANES, Simd};
use crate::elementwise::{Elementwise, map};
use crate::math;
use crate::pool::Pool;
use crate::tensor::Tensor;

/// An activation function, by its name in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x): `silu`, `swish`.
    Silu,
    /// x · Φ(x) with the exact error function: `gelu`.
    Gelu,
    /// The tanh approximation: `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`.
    GeluTanh,
    /// x · sigmoid(1.702 x): `quick_gelu`.
    GeluQuick,
    /// max(x, 0): `relu`.
    Relu,
    /// max(x, 0)²: `relu2`.
    ReluSquared,
    /// tanh: `tanh`.
    Tanh,
}

impl Activation {
    /// The function that transformers' `hidden_act` names.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" | "gelu_python" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => Self::GeluTanh,
            "quick_gelu" => Self::GeluQuick,
            "relu" => Self::Relu,
            "relu2" => Self::ReluSquared,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }
}

#[inline(always)]
unsafe fn value<S: Simd>(a: Activation, x: S::F) -> S::F {
    match a {
        Activation::Silu => S::mul(x, math::sigmoid::<S>(x)),
        Activation::Gelu => {
            // The error function has no cheap expression at full f32 accuracy; exact GELU
            // families are few, so it goes lane by lane.
            let mut lanes = [0.0f32; LANES];
            S::store(lanes.as_mut_ptr(), x);
            for v in &mut lanes {
                *v = 0.5 * *v * (1.0 + libm::erff(*v * std::f32::consts::FRAC_1_SQRT_2));
            }
            S::load(lanes.as_ptr())
        }
        Activation::GeluTanh => {
            // sqrt(2/pi) (x + 0.044715 x³)
            let cubic = S::fma(S::mul(x, x), S::splat(0.044715), S::splat(1.0));
            let t = math::tanh::<S>(S::mul(S::mul(x, cubic), S::splat(0.797_884_56)));
            S::mul(S::mul(S::splat(0.5), x), S::add(S::splat(1.0), t))
        }
        Activation::GeluQuick => S::mul(x, math::sigmoid::<S>(S::mul(x, S::splat(1.702)))),
        // In this order what is no number stays.
        Activation::Relu => S::max(S::splat(0.0), x),
        Activation::ReluSquared => {
            let r = S::max(S::splat(0.0), x);
            S::mul(r, r)
        }
        Activation::Tanh => math::tanh::<S>(x),
    }
}

#[derive(Clone, Copy)]
struct Plain(Activation);
impl Elementwise for Plain {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, _: S::F) -> S::F {
        value::<S>(self.0, x)
    }
}

#[derive(Clone, Copy)]
struct Gated(Activation);
impl Elementwise for Gated {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, y: S::F) -> S::F {
        S::mul(value::<S>(self.0, x), y)
    }
}

/// x <- a(x).
pub fn activate(pool: &Pool, a: Activation, x: &mut Tensor) {
    map(pool, Plain(a), x, None);
}

/// gate <- a(gate) · up.
///
/// # Panics
/// If the shapes differ.
pub fn activate_gated(pool: &Pool, a: Activation, gate: &mut Tensor, up: &Tensor) {
    map(pool, Gated(a), gate, Some(up));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn match_f64_definitions() {
        let pool = Pool::new(1);
        let xs: Vec<f32> = (-400..400).map(|i| i as f32 * 0.025).collect();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        type Definition = Box<dyn Fn(f64) -> f64>;
        let cases: [(&str, Definition); 6] = [
            ("silu", Box::new(move |x| x * sigmoid(x))),
            ("gelu", Box::new(|x| 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())))),
            (
                "gelu_new",
                Box::new(|x| {
                    0.5 * x * (1.0 + (0.797884560802865 * (x + 0.044715 * x * x * x)).tanh())
                }),
            ),
            ("quick_gelu", Box::new(move |x| x * sigmoid(1.702 * x))),
            ("relu", Box::new(|x| x.max(0.0))),
            ("relu2", Box::new(|x| x.max(0.0) * x.max(0.0))),
        ];
        for (name, truth) in cases {
            let mut t = Tensor::from_vec(1, xs.len(), xs.clone());
            activate(&pool, Activation::from_name(name).unwrap(), &mut t);
            for (&x, &y) in xs.iter().zip(t.as_slice()) {
                let want = truth(f64::from(x));
                assert!((f64::from(y) - want).abs() < 1e-6 * (1.0 + want.abs()), "{name}({x})");
            }
            let mut t = Tensor::from_vec(1, 1, vec![f32::NAN]);
            activate(&pool, Activation::from_name(name).unwrap(), &mut t);
            assert!(t.row(0)[0].is_nan(), "{name}");
        }
        assert!(Activation::from_name("mish").is_none());
    }
}
