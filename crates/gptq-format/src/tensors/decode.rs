//! Stored little-endian elements to the types that are computed with. Each function converts as many elements as `out`
//! holds and reports the first that is not allowed; the loops have no other exit, so that they vectorize.

use crate::dtype::DType;
use crate::gguf::dequantize_rows;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// The first element that is not allowed.
pub(super) struct Bad {
    /// Its index in `out`.
    pub(super) index: usize,
    pub(super) value: String,
    pub(super) expected: &'static str,
}

type Decoded = Result<(), Bad>;

pub(super) type F32Decoder = Box<dyn Fn(&[u8], &mut [f32]) -> Decoded>;

/// The conversion from `dtype` to f32; `None` if it is not a float type.
pub(super) fn to_f32(dtype: DType) -> Option<F32Decoder> {
    Some(match dtype {
        DType::F32 => checked(|bytes, out| {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }),
        DType::F64 => checked(|bytes, out| {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *o = f64::from_le_bytes(*b) as f32;
            }
        }),
        DType::BF16 => checked(|bytes, out| {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = bf16_to_f32(*b);
            }
        }),
        DType::F16 => checked(|bytes, out| {
            // The slice conversion uses the CPU's instruction, but wants aligned halves: through a small buffer.
            let mut halves = [f16::ZERO; 512];
            for (o, b) in out.chunks_mut(512).zip(bytes.as_chunks::<2>().0.chunks(512)) {
                let halves = &mut halves[..o.len()];
                for (h, b) in halves.iter_mut().zip(b) {
                    *h = f16::from_le_bytes(*b);
                }
                halves.convert_to_f32_slice(o);
            }
        }),
        DType::Ggml(ggml) => {
            ggml.block()?;
            Box::new(move |bytes, out| {
                // Lengths are whole blocks of rows, so this cannot fail; were it to, the message is the reason.
                dequantize_rows(ggml, bytes, out).map_err(|e| Bad {
                    index: 0,
                    value: e.to_string(),
                    expected: "whole blocks",
                })?;
                finite_f32(out)
            })
        }
        _ => return None,
    })
}

#[allow(clippy::unnecessary_wraps, reason = "one signature for all conversions")]
pub(super) fn i32_to_i32(bytes: &[u8], out: &mut [i32]) -> Decoded {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *o = i32::from_le_bytes(*b);
    }
    Ok(())
}

pub(super) fn i64_to_i32(bytes: &[u8], out: &mut [i32]) -> Decoded {
    for (index, (o, b)) in out.iter_mut().zip(bytes.as_chunks::<8>().0).enumerate() {
        let value = i64::from_le_bytes(*b);
        *o = i32::try_from(value).map_err(|_| Bad {
            index,
            value: value.to_string(),
            expected: "an integer of 32 bits",
        })?;
    }
    Ok(())
}

pub(super) fn f16_to_f16(bytes: &[u8], out: &mut [f16]) -> Decoded {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *o = f16::from_le_bytes(*b);
    }
    finite_f16(out, |i| out[i].to_f32())
}

pub(super) fn f32_to_f16(bytes: &[u8], out: &mut [f16]) -> Decoded {
    let values = bytes.as_chunks::<4>().0;
    for (o, b) in out.iter_mut().zip(values) {
        *o = f16::from_f32(f32::from_le_bytes(*b));
    }
    finite_f16(out, |i| f32::from_le_bytes(values[i]))
}

pub(super) fn bf16_to_f16(bytes: &[u8], out: &mut [f16]) -> Decoded {
    let values = bytes.as_chunks::<2>().0;
    for (o, b) in out.iter_mut().zip(values) {
        *o = f16::from_f32(bf16_to_f32(*b));
    }
    finite_f16(out, |i| bf16_to_f32(values[i]))
}

fn bf16_to_f32(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

fn checked(convert: impl Fn(&[u8], &mut [f32]) + 'static) -> F32Decoder {
    Box::new(move |bytes, out| {
        convert(bytes, out);
        finite_f32(out)
    })
}

fn finite_f32(out: &[f32]) -> Decoded {
    // NaN and infinity are the values whose magnitude bits are not below this pattern; a maximum of integers vectorizes
    // where a search does not.
    const INFINITY: u32 = 0x7F80_0000;
    let magnitudes = out.iter().map(|v| v.to_bits() & 0x7FFF_FFFF);
    if magnitudes.fold(0, u32::max) < INFINITY {
        return Ok(());
    }
    let index = out.iter().position(|v| !v.is_finite()).unwrap_or(0);
    Err(Bad { index, value: out[index].to_string(), expected: "a finite value of 32 bits" })
}

fn finite_f16(out: &[f16], stored: impl Fn(usize) -> f32) -> Decoded {
    match out.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Bad {
            index,
            value: stored(index).to_string(),
            expected: "a finite value of 16 bits (at most 65504)",
        }),
    }
}
