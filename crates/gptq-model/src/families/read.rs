//! What the families share in reading a config: counts, activation names, rope in both spellings, sliding windows.

use gptq_compute::{Activation, RopeStyle};
use serde_json::Value;

use crate::Result;
use crate::fields::Fields;
use crate::rope::{Rope, RopeScaling, yarn_attention};
use crate::spec::{Attention, GateUp, Layer, Mlp, Qkv};

/// More blocks than any model has.
const MAX_LAYERS: usize = 4096;

/// The sizes that nearly every config has under the same names.
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) vocab: usize,
    pub(super) max_positions: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// The keys of [`Sizes`] in a config.
pub(super) struct SizeKeys {
    pub(super) hidden: &'static str,
    pub(super) layers: &'static str,
    pub(super) heads: &'static str,
    pub(super) max_positions: Option<&'static str>,
}

/// The names of most families since Llama.
pub(super) const USUAL: SizeKeys = SizeKeys {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    max_positions: Some("max_position_embeddings"),
};

/// The names of GPT-2 and its relatives.
pub(super) const GPT2: SizeKeys = SizeKeys {
    hidden: "n_embd",
    layers: "n_layer",
    heads: "n_head",
    max_positions: Some("n_positions"),
};

impl Sizes {
    /// Reads and cross-checks the sizes; `num_key_value_heads` and `head_dim` are optional.
    pub(super) fn read(f: &Fields<'_>, keys: &SizeKeys) -> Result<Self> {
        let hidden = f.count(keys.hidden)?;
        let layers = layer_count(f, keys.layers)?;
        let heads = f.count(keys.heads)?;
        let kv_heads = f.count_or("num_key_value_heads", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(
                f.bad("num_key_value_heads", format!("a divisor of {} ({heads})", keys.heads))
            );
        }
        let head_dim = match f.opt_count("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(f.bad(keys.heads, format!("a divisor of {} ({hidden})", keys.hidden)));
            }
        };
        let max_positions = keys.max_positions.map_or(Ok(2048), |key| f.count_or(key, 2048))?;
        Ok(Self {
            hidden,
            layers,
            vocab: f.count("vocab_size")?,
            max_positions,
            heads,
            kv_heads,
            head_dim,
        })
    }

    /// Attention with plain `q_proj`, `k_proj`, `v_proj`, `o_proj` under `self_attn`, scaled by 1/sqrt(head_dim), causal.
    pub(super) fn attention(&self) -> Attention {
        Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: inverse_root(self.head_dim as f64),
            scale_by_depth: false,
            causal: true,
            relative: None,
            soft_cap: None,
            clip_qkv: None,
            qkv: Qkv::Separate {
                q: "self_attn.q_proj",
                k: "self_attn.k_proj",
                v: "self_attn.v_proj",
            },
            qkv_bias: false,
            qk_norm: None,
            out: "self_attn.o_proj",
            out_bias: false,
        }
    }

    /// Blocks that all look at every earlier token and rotate with the first rope.
    pub(super) fn alike(&self) -> Vec<Layer> {
        vec![Layer { rope: Some(0), ..Layer::default() }; self.layers]
    }
}

/// A number of blocks.
pub(super) fn layer_count(f: &Fields<'_>, key: &str) -> Result<usize> {
    let layers = f.count(key)?;
    if layers > MAX_LAYERS { Err(f.bad(key, format!("at most {MAX_LAYERS}"))) } else { Ok(layers) }
}

/// 1/sqrt(x), the usual scale of attention scores.
pub(super) fn inverse_root(x: f64) -> f32 {
    (1.0 / x.sqrt()) as f32
}

/// Llama's gated MLP: `gate_proj`, `up_proj`, `down_proj` under `mlp`.
pub(super) fn gated(f: &Fields<'_>, activation_key: &str, default: &str) -> Result<Mlp> {
    Ok(Mlp::Gated {
        gate_up: GateUp::Separate { gate: "mlp.gate_proj", up: "mlp.up_proj" },
        down: "mlp.down_proj",
        width: f.count("intermediate_size")?,
        activation: activation(f, activation_key, default)?,
        bias: false,
    })
}

/// The activation named by `key` (transformers' ACT2FN), or `default`.
pub(super) fn activation(f: &Fields<'_>, key: &str, default: &str) -> Result<Activation> {
    Activation::from_name(f.text_or(key, default)?).ok_or_else(|| {
        f.bad(key, "silu, swish, gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh, quick_gelu, relu, relu2 or tanh")
    })
}

/// Whether block `layer` has a sliding window: `layer_types` where it is written, else `default`.
pub(super) fn sliding_layers(
    f: &Fields<'_>,
    layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(types) = f.opt_texts("layer_types")? else {
        return Ok((0..layers).map(default).collect());
    };
    if types.len() != layers {
        return Err(f.bad("layer_types", format!("one entry for each of {layers} layers")));
    }
    let sliding = types.iter().map(|kind| match *kind {
        "sliding_attention" => Some(true),
        "full_attention" => Some(false),
        _ => None,
    });
    sliding
        .collect::<Option<_>>()
        .ok_or_else(|| f.bad("layer_types", "sliding_attention or full_attention"))
}

/// Blocks that use the first rope, with `sliding_window` where `sliding` says so.
pub(super) fn windowed(f: &Fields<'_>, sliding: &[bool]) -> Result<Vec<Layer>> {
    let window = f.opt_count("sliding_window")?;
    if window.is_none() && sliding.contains(&true) {
        return Err(f.missing("sliding_window"));
    }
    Ok(sliding
        .iter()
        .map(|&on| Layer { window: window.filter(|_| on), rope: Some(0), ..Layer::default() })
        .collect())
}

/// What a family has to say about its rope besides the config.
#[derive(Clone, Copy)]
pub(super) struct RopeDefaults {
    /// Key of the base outside `rope_parameters`, and its default.
    pub(super) theta: (&'static str, f64),
    /// Key of the rotated share of a head outside `rope_parameters`, and its default.
    pub(super) partial: (&'static str, f64),
    pub(super) style: RopeStyle,
    /// Names under which the family's old configs mean `longrope`.
    pub(super) longrope_aliases: &'static [&'static str],
}

impl Default for RopeDefaults {
    fn default() -> Self {
        Self {
            theta: ("rope_theta", 10000.0),
            partial: ("partial_rotary_factor", 1.0),
            style: RopeStyle::Half,
            longrope_aliases: &[],
        }
    }
}

/// The one rope of a model: `rope_parameters` (transformers 5) or `rope_theta`, `partial_rotary_factor` and `rope_scaling`.
pub(super) fn rope(f: &Fields<'_>, sizes: &Sizes, defaults: RopeDefaults) -> Result<Rope> {
    let parameters = parameters(f)?;
    rope_from(f, parameters.as_ref(), sizes, defaults)
}

/// The ropes of blocks without and with a window: from `rope_parameters` by kind of block, or the one that the top level
/// describes and an unscaled one with the base of its own.
pub(super) fn ropes_by_kind(
    f: &Fields<'_>,
    sizes: &Sizes,
    full: RopeDefaults,
    sliding: RopeDefaults,
) -> Result<Vec<Rope>> {
    let parameters = parameters(f)?;
    let p = parameters.as_ref();
    if p.is_some_and(|p| p.has("full_attention") || p.has("sliding_attention")) {
        let of_kind = |kind| p.map_or(Ok(None), |p| p.opt_object(kind));
        let (for_full, for_sliding) = (of_kind("full_attention")?, of_kind("sliding_attention")?);
        return Ok(vec![
            rope_from(f, for_full.as_ref(), sizes, full)?,
            rope_from(f, for_sliding.as_ref(), sizes, sliding)?,
        ]);
    }
    Ok(vec![rope_from(f, p, sizes, full)?, rope_from(f, None, sizes, sliding)?])
}

/// Gives each block the first or, with a window, the second of two ropes.
pub(super) fn with_sliding_rope(layers: &mut [Layer], sliding: &[bool]) {
    for (layer, &sliding) in layers.iter_mut().zip(sliding) {
        layer.rope = Some(usize::from(sliding));
    }
}

/// The object that holds the rope parameters: as in transformers, `rope_scaling` wins where both are written.
fn parameters<'a>(f: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    let parameters = f.opt_object("rope_parameters")?;
    Ok(f.opt_object("rope_scaling")?
        .filter(|scaling| scaling.keys().next().is_some())
        .or(parameters))
}

/// The rope described by `parameters`, with what they leave out taken from the top level `f`, then from `defaults`.
fn rope_from(
    f: &Fields<'_>,
    parameters: Option<&Fields<'_>>,
    sizes: &Sizes,
    defaults: RopeDefaults,
) -> Result<Rope> {
    let top_theta = f.positive_or(defaults.theta.0, defaults.theta.1)?;
    let top_partial = f.positive_or(defaults.partial.0, defaults.partial.1)?;
    let theta = parameters.map_or(Ok(top_theta), |p| p.positive_or("rope_theta", top_theta))?;
    let partial = parameters
        .map_or(Ok(top_partial), |p| p.positive_or("partial_rotary_factor", top_partial))?;
    let rotary_dim = (sizes.head_dim as f64 * partial) as usize;
    if rotary_dim < 2
        || !rotary_dim.is_multiple_of(2)
        || rotary_dim > sizes.head_dim
        || theta <= 1.0
    {
        let expected = format!(
            "a rotary base above 1 (is {theta}) and an even number of rotated columns from 2 to the head dimension {} \
             (is {rotary_dim})",
            sizes.head_dim
        );
        return Err(f.bad(
            if f.has("rope_parameters") { "rope_parameters" } else { defaults.theta.0 },
            expected,
        ));
    }
    let aliases = defaults.longrope_aliases;
    let scaling = parameters.map_or(Ok(RopeScaling::None), |p| {
        scaling(f, p, sizes.max_positions, rotary_dim, aliases)
    })?;
    Ok(Rope { theta, rotary_dim, style: defaults.style, scaling })
}

fn scaling(
    top: &Fields<'_>,
    p: &Fields<'_>,
    max_positions: usize,
    rotary_dim: usize,
    longrope_aliases: &[&str],
) -> Result<RopeScaling> {
    const KNOWN: [&str; 17] = [
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
        "short_factor",
        "long_factor",
        "max_position_embeddings",
    ];
    if let Some(key) = p.keys().find(|key| !KNOWN.contains(key)) {
        return Err(p.unhandled(key));
    }
    let original = || match top.opt_count(ORIGINAL)? {
        Some(original) => Ok(original),
        None => p.count_or(ORIGINAL, max_positions),
    };
    let factor = || match p.number("factor")? {
        factor if factor >= 1.0 => Ok(factor),
        _ => Err(p.bad("factor", "a number of at least 1")),
    };
    let key = if p.has("rope_type") { "rope_type" } else { "type" };
    let name = p.opt_text(key)?.unwrap_or("default");
    match if longrope_aliases.contains(&name) { "longrope" } else { name } {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" if rotary_dim > 2 => {
            Ok(RopeScaling::Dynamic { factor: factor()?, max_positions })
        }
        "yarn" => {
            // transformers falls back to the ratio of the context lengths.
            let original = original()?;
            let factor =
                if p.has("factor") { factor()? } else { max_positions as f64 / original as f64 };
            let given = |key| p.opt_number(key).map(|value| value.filter(|&value| value != 0.0));
            let implied = match (given("mscale")?, given("mscale_all_dim")?) {
                (Some(one), Some(all)) => yarn_attention(factor, one) / yarn_attention(factor, all),
                _ => yarn_attention(factor, 1.0),
            };
            Ok(RopeScaling::Yarn {
                factor,
                original,
                beta_fast: given("beta_fast")?.unwrap_or(32.0),
                beta_slow: given("beta_slow")?.unwrap_or(1.0),
                attention_factor: p.positive_or("attention_factor", implied)?,
                truncate: p.flag_or("truncate", true)?,
            })
        }
        "llama3" => {
            let (low, high) = (p.number("low_freq_factor")?, p.number("high_freq_factor")?);
            if low <= 0.0 || high <= low {
                return Err(p.bad(
                    "high_freq_factor",
                    format!("above low_freq_factor ({low}), which is above 0"),
                ));
            }
            Ok(RopeScaling::Llama3 { factor: factor()?, low, high, original: original()? })
        }
        "longrope" if top.has(ORIGINAL) || p.has(ORIGINAL) => {
            long(p, original()?, max_positions, rotary_dim)
        }
        "longrope" => Err(p.missing(ORIGINAL)),
        _ => Err(p.bad(key, "default, linear, dynamic, yarn, llama3 or longrope")),
    }
}

/// Key of the context length of the pretraining, beside or inside the rope parameters; beside wins, as in transformers.
const ORIGINAL: &str = "original_max_position_embeddings";

fn long(
    p: &Fields<'_>,
    original: usize,
    max_positions: usize,
    rotary_dim: usize,
) -> Result<RopeScaling> {
    let divisors = |key| {
        let list = p.numbers(key)?;
        let usable = list.len() == rotary_dim / 2 && list.iter().all(|&divisor| divisor > 0.0);
        if usable {
            Ok(list)
        } else {
            Err(p.bad(key, format!("{} numbers above 0", rotary_dim / 2)))
        }
    };
    let factor = p.number_or("factor", max_positions as f64 / original as f64)?;
    let implied =
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
    Ok(RopeScaling::Long {
        short: divisors("short_factor")?,
        long: divisors("long_factor")?,
        original,
        attention_factor: p.positive_or("attention_factor", implied)?,
    })
}

/// Slopes of ALiBi (Press et al. 2022) for any number of heads, as BLOOM and Falcon compute them: powers of one base for
/// the largest power of two, then every other power of that base's root.
pub(super) fn alibi_slopes(heads: usize) -> Vec<f32> {
    let power = 1usize << heads.ilog2();
    let base = |count: usize| (-8.0 / count as f64).exp2() as f32;
    let to_the = |base: f32, exponent: usize| f64::from(base).powi(exponent as i32) as f32;
    let first = (1..=power).map(|i| to_the(base(power), i));
    let rest = (0..heads - power).map(|i| to_the(base(2 * power), 2 * i + 1));
    first.chain(rest).collect()
}

/// Refuses every value of `key` but `false` (and absence).
pub(super) fn never(f: &Fields<'_>, key: &str) -> Result<()> {
    f.only(key, &Value::Bool(false))
}
