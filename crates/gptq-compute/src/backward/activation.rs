//! Derivatives of activation functions.

use crate::activation::Activation;
use crate::arch::{LANES, Simd};
use crate::elementwise::{Elementwise, map};
use crate::math;
use crate::pool::Pool;
use crate::tensor::Tensor;

#[inline(always)]
unsafe fn derivative<S: Simd>(a: Activation, x: S::F) -> S::F {
    let one = S::splat(1.0);
    // d/dx x σ(c x) = σ (1 + c x (1 - σ)).
    let swish = |c: f32| {
        let cx = S::mul(x, S::splat(c));
        let s = math::sigmoid::<S>(cx);
        S::mul(s, S::fma(cx, S::sub(one, s), one))
    };
    match a {
        Activation::Silu => swish(1.0),
        Activation::GeluQuick => swish(1.702),
        Activation::Gelu => {
            // Φ(x) + x φ(x); lane by lane as the function itself.
            let mut lanes = [0.0f32; LANES];
            S::store(lanes.as_mut_ptr(), x);
            for v in &mut lanes {
                let area = 0.5 * (1.0 + libm::erff(*v * std::f32::consts::FRAC_1_SQRT_2));
                *v = area + *v * 0.398_942_3 * (-0.5 * *v * *v).exp();
            }
            S::load(lanes.as_ptr())
        }
        Activation::GeluTanh => {
            // u = sqrt(2/pi) (x + 0.044715 x³); 1/2 (1 + t) + 1/2 x (1 - t²) u', t = tanh u.
            let (half, c) = (S::splat(0.5), S::splat(0.797_884_56));
            let x2 = S::mul(x, x);
            let u = S::mul(S::mul(x, S::fma(x2, S::splat(0.044715), one)), c);
            let du = S::mul(S::fma(x2, S::splat(3.0 * 0.044715), one), c);
            let t = math::tanh::<S>(u);
            let bend = S::mul(S::mul(half, x), S::mul(S::fnma(t, t, one), du));
            S::fma(half, S::add(one, t), bend)
        }
        Activation::Relu => S::select(S::lt(S::splat(0.0), x), one, S::splat(0.0)),
        Activation::ReluSquared => S::mul(S::splat(2.0), S::max(x, S::splat(0.0))),
        Activation::Tanh => {
            let t = math::tanh::<S>(x);
            S::fnma(t, t, one)
        }
    }
}

#[derive(Clone, Copy)]
struct Derivative(Activation);
impl Elementwise for Derivative {
    #[inline(always)]
    unsafe fn apply<S: Simd>(self, x: S::F, dy: S::F) -> S::F {
        S::mul(derivative::<S>(self.0, x), dy)
    }
}

/// x <- a'(x) · dy: from the input of y = a(x) and the gradient of y that of x.
///
/// # Panics
/// If the shapes differ.
#[track_caller]
pub fn activate_backward(pool: &Pool, a: Activation, x: &mut Tensor, dy: &Tensor) {
    map(pool, Derivative(a), x, Some(dy));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn match_differences_in_f64() {
        let pool = Pool::new(1);
        let xs: Vec<f32> = (-400..400).map(|i| (i as f32 + 0.5) * 0.025).collect();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        type Definition = Box<dyn Fn(f64) -> f64>;
        let tanh_gelu =
            |x: f64| 0.5 * x * (1.0 + (0.797884560802865 * (x + 0.044715 * x * x * x)).tanh());
        let cases: [(&str, Definition); 7] = [
            ("silu", Box::new(move |x| x * sigmoid(x))),
            ("gelu", Box::new(|x| 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())))),
            ("gelu_new", Box::new(tanh_gelu)),
            ("quick_gelu", Box::new(move |x| x * sigmoid(1.702 * x))),
            ("relu", Box::new(|x| x.max(0.0))),
            ("relu2", Box::new(|x| x.max(0.0) * x.max(0.0))),
            ("tanh", Box::new(f64::tanh)),
        ];
        let dy: Vec<f32> = (0..xs.len()).map(|i| 1.0 - (i % 3) as f32).collect();
        for (name, function) in cases {
            let mut t = Tensor::from_vec(1, xs.len(), xs.clone());
            let dy = Tensor::from_vec(1, xs.len(), dy.clone());
            activate_backward(&pool, Activation::from_name(name).unwrap(), &mut t, &dy);
            for ((&x, &got), &dy) in xs.iter().zip(t.as_slice()).zip(dy.as_slice()) {
                let x = f64::from(x);
                let want = f64::from(dy) * (function(x + 1e-5) - function(x - 1e-5)) / 2e-5;
                assert!((f64::from(got) - want).abs() < 3e-6 * (1.0 + want.abs()), "{name}({x})");
            }
        }
    }
}
