//! What a run holds in memory, moment by moment.

use gptq_compute::AttnTrace;
use gptq_format::{Checkpoint, DType, ModuleSettings};
use gptq_model::spec::{GateUp, Mlp, Qkv};
use gptq_model::{ActivationType, BlockState, LinearSpec, Spec, Trace, block_parts, loaded_bytes};

use super::activations::{chunks_of, windows_per_chunk};
use super::fold::SEARCH_ROWS;
use super::layout::{Layout, linear_shape};
use super::linear::{ERROR_WEIGHTS, slab_rows};
use super::native::is_corrected;
use super::tune::TOKENS;
use super::{Job, Method};
use crate::solver::Correction;

const F32: u64 = 4;
/// What the allocator keeps for itself, and the products' buffers of each thread.
const ALLOCATOR: u64 = 16 << 20;
const PER_THREAD: u64 = 4 << 20;
/// Most that was freed between two passes and is not given back to the system: glibc keeps buffers of
/// up to 32 MiB, of which a chunk has a few.
const KEPT: u64 = 64 << 20;

/// What is in memory at one time, by what it is for, in bytes.
pub(crate) type Moment = Vec<(&'static str, u64)>;

pub(crate) fn total(moment: &[(&'static str, u64)]) -> u64 {
    moment.iter().map(|(_, bytes)| bytes).sum()
}

/// The needs of one job.
pub(crate) struct Memory<'a> {
    job: &'a Job<'a>,
    spec: &'a Spec,
    layout: &'a Layout,
    /// Calibration tokens; 0 where nothing is calibrated.
    tokens: usize,
    chunk_tokens: usize,
    /// Bytes of the activations of all tokens, and of a chunk; of both streams where there are two.
    activations: u64,
    chunk: u64,
    /// Bytes of a chunk in the scratch files.
    slot: u64,
    /// Tokens of a window.
    seqlen: usize,
    /// What makes up for the errors of inputs.
    correction: Correction,
    /// Bytes of the buffers of a chunk on its way through a block.
    temporaries: u64,
    /// Bytes of a Hessian with distances between tokens.
    distances: u64,
}

/// Needs of the linears that share one input.
#[derive(Clone, Copy)]
struct Shared {
    inputs: u64,
    /// How their inputs are corrected.
    correction: Correction,
    /// Whether groups are formed along the order of some of them.
    desc_act: bool,
    /// The most that solving one of them takes beside Hessian and factor.
    solving: u64,
}

impl<'a> Memory<'a> {
    /// The needs of `job` with so many calibration tokens in windows of `seqlen`.
    pub(crate) fn new(
        job: &'a Job<'a>,
        spec: &'a Spec,
        layout: &'a Layout,
        tokens: usize,
        seqlen: usize,
    ) -> Self {
        let chunk_tokens = (windows_per_chunk(seqlen) * seqlen).min(tokens);
        let kind = job.options.activation_dtype;
        let correction = if tokens > 0 { job.options.correction } else { Correction::None };
        let streams = if correction == Correction::None { 1 } else { 2 };
        // Both streams are taken through a block together.
        let together = correction != Correction::None && !job.options.true_sequential;
        let caches = if together { 2 } else { 1 };
        let state = |tokens, kind| streams * BlockState::saved_bytes(spec, tokens, kind) as u64;
        // Packed ones are whole one chunk at a time.
        let whole = if kind == ActivationType::F32 { 0 } else { chunk_tokens };
        // The stream before a block that will run again.
        let again = job.options.runs_blocks_again();
        let start = if again { (tokens * spec.hidden * kind.size()) as u64 } else { 0 };
        Self {
            correction,
            job,
            spec,
            layout,
            tokens,
            chunk_tokens,
            seqlen,
            activations: state(tokens, kind) + state(whole, ActivationType::F32) + start,
            chunk: state(chunk_tokens, ActivationType::F32),
            slot: state(chunk_tokens, kind)
                + if again { BlockState::saved_bytes(spec, chunk_tokens, kind) as u64 } else { 0 },
            temporaries: if tokens > 0 {
                temporaries(spec, chunk_tokens, seqlen, caches)
                    + job.pool.threads() as u64 * distance_products(spec, seqlen)
            } else {
                0
            },
            distances: if tokens > 0 { distance_hessian(spec) } else { 0 },
        }
    }

    /// The moment of the run that needs most, with the activations in memory or in a scratch file.
    pub(crate) fn peak(&self, spill: bool) -> Moment {
        let moments = self.moments(spill).into_iter();
        let mut peak = moments.max_by_key(|moment| total(moment)).unwrap_or_default();
        let threads = self.job.pool.threads() as u64;
        let kept = if spill { KEPT.min(self.chunk + self.temporaries) } else { 0 };
        peak.push(("allocator and buffers of threads", ALLOCATOR + threads * PER_THREAD + kept));
        peak
    }

    /// What is needed to measure the sensitivities of groups, with the streams of their `variants`: a run whose blocks stay
    /// floats beside the codes of some linears, and logits of variants.
    pub(crate) fn measuring(&self, variants: u64) -> Moment {
        let blocks = (0..self.spec.layer_count()).map(|layer| self.block(layer));
        let mut moment = self.peak(false);
        moment.push(("float block", blocks.map(|(_, floats)| floats).max().unwrap_or(0)));
        moment.push(("activations of variants", variants));
        moment
    }

    /// Bytes of the scratch file.
    pub(crate) fn scratch_bytes(&self) -> u64 {
        self.tokens.div_ceil(self.chunk_tokens.max(1)) as u64 * self.slot
    }

    fn moments(&self, spill: bool) -> Vec<Moment> {
        let mut moments = Vec::from(self.embedding(spill));
        for layer in 0..self.spec.layer_count() {
            let (packed, floats) = self.block(layer);
            let stages = self.spec.stages(layer);
            let correction =
                |stage| if is_corrected(stage) { self.correction } else { Correction::None };
            let shared = stages.iter().map(|s| self.shared(&s.linears, correction(s.stage)));
            let stages: Vec<Shared> = shared.flatten().collect();
            // Without true-sequential order the Hessians of a block exist together, and its floats
            // beside its codes.
            let (block, others) = if self.job.options.true_sequential || self.tokens == 0 {
                (packed, 0)
            } else {
                // And what their inputs are corrected by.
                let sums = |s: &Shared| self.sums() + u64::from(s.correction != Correction::None);
                let hessians = stages.iter().map(|s| sums(s) * s.inputs * s.inputs * F32);
                (packed + floats, hessians.sum())
            };
            let kept = vec![("block", block), ("Hessians of a block", others)];
            let mut moment = self.with_activations(spill, kept);
            if self.correction != Correction::None {
                moment.push(("floats of a stage", self.native_floats(layer)));
            }
            if spill {
                moment.push(("temporaries of a chunk", self.temporaries));
            }
            if !self.job.options.true_sequential {
                moment.push(("copy of a chunk", self.chunk));
            }
            moments.push(moment);
            if self.job.options.tune_blocks > 0 {
                moments.push(self.tuning(spill, layer, packed, floats));
            }
            if self.job.options.folds() && self.tokens > 0 {
                moments.push(self.folding(spill, layer, floats, &stages));
            }
            for stage in stages {
                moments.extend(self.solving(spill, stage, block, others));
            }
        }
        if let Some(head) = self.spec.head_linear().filter(|_| self.layout.config.lm_head)
            && let Some(shared) = self.shared(&[head], self.correction)
        {
            moments.extend(self.solving(spill, shared, 0, 0));
        }
        moments
    }

    /// Sums over the inputs of a stage: windows that are held out have their own.
    fn sums(&self) -> u64 {
        1 + u64::from(self.job.options.damp_auto)
    }

    /// AWQ's scales are found: the block as floats, the Hessians of all its stages, and some outputs
    /// of a linear as they are, scaled, rounded (codes, weights) and multiplied with a Hessian.
    fn folding(&self, spill: bool, layer: usize, floats: u64, stages: &[Shared]) -> Moment {
        let hessians = stages.iter().map(|s| self.sums() * s.inputs * s.inputs * F32).sum();
        let kept = vec![("block", floats), ("Hessians of a block", hessians)];
        let mut moment = self.with_activations(spill, kept);
        if spill {
            moment.push(("temporaries of a chunk", self.temporaries));
        }
        moment.push(("copy of a chunk", self.chunk));
        let linears = self.spec.stages(layer).into_iter().flat_map(|stage| stage.linears);
        let slab = |l: LinearSpec| {
            let all = (l.in_features * l.out_features) as u64;
            let turned = if l.transposed { F32 * all } else { 0 };
            turned + (SEARCH_ROWS.min(l.out_features) * l.in_features) as u64 * (4 * F32 + 1)
        };
        moment.push(("linear being scaled", linears.map(slab).max().unwrap_or(0)));
        moment
    }

    /// A block is tuned: as it is saved and as floats, with the state of its gradients; the tokens it is tuned on, and one
    /// chunk on its way forward and back.
    fn tuning(&self, spill: bool, layer: usize, packed: u64, floats: u64) -> Moment {
        let linears = || self.spec.stages(layer).into_iter().flat_map(|stage| stage.linears);
        let size = |l: &LinearSpec| (l.in_features * l.out_features) as u64;
        let (all, largest) =
            (linears().map(|l| size(&l)).sum::<u64>(), linears().map(|l| size(&l)).max());
        let scales = |l: LinearSpec| {
            let settings = self.layout.settings(&l.module)?;
            Some((linear_shape(settings, &l).groups() * l.out_features) as u64)
        };
        let scales: u64 = linears().filter_map(scales).sum();
        // Floats, codes as 16-bit steps, four numbers for each scale; a linear being made anew, or the
        // gradient of its weights. The float block is gone by then.
        let block = (F32 + 2) * all + 4 * F32 * scales + 2 * F32 * largest.unwrap_or(0);
        let chunk = self.chunk_tokens;
        let chunks = chunks_of(TOKENS, chunk, self.tokens.div_ceil(chunk.max(1)));
        let hidden = self.spec.hidden as u64 * F32;
        let mut moment = self.with_activations(spill, vec![("block", packed)]);
        moment.push(("block being tuned", block.max(floats)));
        moment.push(("tokens that it is tuned on", 2 * (chunks * chunk) as u64 * hidden));
        let tiles = self.job.pool.threads() * AttnTrace::tile_bytes(self.seqlen);
        let gradients = Trace::bytes(self.spec, layer, chunk) + tiles;
        moment.push(("gradients of a chunk", gradients as u64));
        if spill {
            moment.push(("temporaries of a chunk", self.temporaries));
        }
        moment
    }

    /// The first moments: the head is checked, tokens are looked up.
    fn embedding(&self, spill: bool) -> [Moment; 2] {
        let Spec { vocab, base, embedding, head, .. } = self.spec;
        let table = format!("{base}{}.weight", embedding.name);
        let owned = |tensor: &str| loaded_bytes(self.job.checkpoint, tensor).owned;
        // Blocks of GGUF are looked up as they are, and tied floats are there once.
        let blocks = block_parts(self.job.checkpoint, &table).is_some();
        let of_table = if blocks { 0 } else { owned(&table) };
        let elements = (vocab * embedding.width) as u64;
        let of_head = match head.name {
            Some(_) if head.unit_rows => F32 * elements,
            Some(_) if head.tied => owned(&table) - of_table,
            Some(name) => owned(&format!("{name}.weight")),
            None => 0,
        };
        // A head that is quantized is read by rows.
        let checked = if self.layout.config.lm_head { 0 } else { of_table + of_head };
        let checked = vec![("embedding and head", checked)];
        // From the output, which has 16 bits; the float stream's from the source.
        let size = if of_table > 0 { of_table } else { 2 * elements };
        let source = self.job.checkpoint.tensors.info(&table).map_or(0, |info| info.bytes as u64);
        let table = match self.correction {
            _ if self.tokens == 0 => 0,
            Correction::None => size,
            _ => size.max(source),
        };
        // Nothing has been through a block yet.
        let activations = match (self.tokens, spill) {
            (0, _) => 0,
            (_, true) => self.chunk,
            (_, false) => self.activations,
        };
        [checked, vec![("embedding", table), ("activations", activations)]]
    }

    /// Sum over the inputs of a stage, its factor, and the solution of its linears.
    fn solving(&self, spill: bool, stage: Shared, block: u64, others: u64) -> [Moment; 3] {
        let matrix = stage.inputs * stage.inputs * F32;
        let mut kept = vec![("block", block), ("Hessians of a block", others)];
        if self.distances > 0 {
            kept.push(("Hessian with distances", self.distances));
        }
        let solve = ("linear being solved", stage.solving);
        if self.tokens == 0 {
            return [vec![("block", block), solve], Vec::new(), Vec::new()];
        }
        let mut sum = self.with_activations(spill, kept.clone());
        let chunk = self.chunk_tokens as u64;
        // Rows of windows that are held out are summed up apart.
        let held = if self.job.options.damp_auto { matrix } else { 0 };
        if held > 0 {
            let split = chunk * stage.inputs * F32;
            sum.push(("held-out windows", held + split));
        }
        let (corrects, shift) = match stage.correction {
            Correction::None => (0, 0),
            _ => (1, matrix),
        };
        let inputs = (1 + 2 * corrects) * chunk * stage.inputs * F32;
        sum.extend([("Hessian", matrix), ("input of a chunk", inputs)]);
        if corrects > 0 {
            sum.push(("sum of input errors", shift));
        }
        // Between passes no chunk of spilled activations is in memory, nor its temporaries.
        let mut between = if spill { kept } else { self.with_activations(false, kept) };
        if corrects > 0 {
            between.push(("sum of input errors", shift));
        }
        let mut factor = between.clone();
        if held > 0 {
            // Beside them the Hessian of all windows, or rows of all linears; and what was left of it by a shrink.
            factor.push(("held-out windows", 2 * held + 3 * 4 * 256 * stage.inputs * F32));
        }
        // H, H in the order of the sweep, and its inverse.
        factor.push(("Hessian and factor", 3 * matrix));
        if stage.correction == Correction::Gptaq {
            between.push(("what columns pass on", matrix));
        }
        let mut solved = between;
        let inverse = match self.job.options.method {
            // Every row starts from a copy of the inverse.
            Method::Obq => (1 + self.job.pool.threads() as u64) * matrix,
            Method::Gptq | Method::Rtn | Method::Awq => 0,
        };
        // Refining groups along the order takes a copy of H in that order.
        let ordered = if self.job.options.refine > 0 && stage.desc_act { matrix } else { 0 };
        // With held-out windows it is solved with a Hessian and judged by another.
        solved.extend([("Hessian and factor", 2 * matrix + held + inverse + ordered), solve]);
        [sum, factor, solved]
    }

    /// Adds what the activations take: all of them with the buffers that stay between passes, or one
    /// chunk.
    fn with_activations(&self, spill: bool, mut moment: Moment) -> Moment {
        if self.tokens > 0 && spill {
            moment.push(("activations of a chunk", self.chunk));
        } else if self.tokens > 0 {
            moment.push(("activations", self.activations));
            moment.push(("temporaries of a chunk", self.temporaries));
        }
        moment
    }

    /// Needs of the quantized ones among linears with one input; `None` if there are none.
    fn shared(&self, linears: &[LinearSpec], correction: Correction) -> Option<Shared> {
        let settings = |l: &LinearSpec| self.layout.settings(&l.module);
        let solving = |l: &LinearSpec| Some(self.linear(l, settings(l)?, correction));
        let solving = linears.iter().filter_map(solving).max()?;
        let desc_act = linears.iter().filter_map(settings).any(|settings| settings.desc_act);
        Some(Shared { inputs: linears.first()?.in_features as u64, correction, desc_act, solving })
    }

    /// The most that solving one linear takes.
    fn linear(
        &self,
        linear: &LinearSpec,
        settings: &ModuleSettings,
        correction: Correction,
    ) -> u64 {
        let (inputs, outputs) = (linear.in_features as u64, linear.out_features as u64);
        let all = inputs * outputs;
        // Turned weights are read as a whole.
        let (turning, turned) = if linear.transposed { (2 * F32 * all, F32 * all) } else { (0, 0) };
        let slab = slab_rows(linear.in_features, linear.out_features) as u64 * inputs;
        let joined = if slab < all { all } else { 0 };
        // Weights, codes, and either weights without dead inputs or three copies of some rows.
        let piece = slab.min(ERROR_WEIGHTS as u64);
        // Panels of the rows at work: weights and codes, and what refining or clipping keeps.
        let options = self.job.options;
        let of_weight = match options.method {
            _ if options.refine > 0 => 7 * F32,
            Method::Awq => 6 * F32,
            _ => 12,
        };
        let rows_of_tasks = self.job.pool.threads() as u64 * 64 * inputs * of_weight;
        // Moved weights, their move and what it was computed from.
        let moves = matches!(correction, Correction::Qep | Correction::Qronos);
        let moved = if moves { 3 * F32 * slab } else { 0 };
        let slabs = turned
            + joined
            + slab * (F32 + 1)
            + moved
            + (F32 * slab + rows_of_tasks).max(3 * F32 * piece);
        let packed = packed_bytes(linear, settings);
        // Codes while they are packed; then the packed codes, as stored, and as they are used.
        turning.max(slabs).max(all + packed).max(3 * packed)
    }

    /// Most floats of a stage that the stream of the float model needs, in bytes.
    fn native_floats(&self, layer: usize) -> u64 {
        let of = |linear: &LinearSpec| {
            // And in 16 bits.
            (linear.in_features * linear.out_features) as u64
                * (float_bytes(self.job.checkpoint, linear) + 2)
        };
        let stages = self.spec.stages(layer).into_iter();
        stages.map(|stage| stage.linears.iter().map(of).sum()).max().unwrap_or(0)
    }

    /// Bytes of a finished block, and of its quantized linears as floats.
    fn block(&self, layer: usize) -> (u64, u64) {
        let (mut finished, mut floats) = (0, 0);
        for linear in self.spec.stages(layer).iter().flat_map(|stage| &stage.linears) {
            let size = (linear.in_features * linear.out_features) as u64;
            match self.layout.settings(&linear.module) {
                Some(settings) => {
                    finished += packed_bytes(linear, settings);
                    floats += size * float_bytes(self.job.checkpoint, linear);
                }
                None if linear.transposed => finished += F32 * size,
                None => finished += 2 * size,
            }
        }
        (finished, floats)
    }
}

/// Bytes of the buffers of a chunk on its way through a block, with so many sets of keys and values.
fn temporaries(spec: &Spec, chunk_tokens: usize, seqlen: usize, caches: usize) -> u64 {
    let Spec { hidden, attention, mlp, moe, .. } = spec;
    let attended = attention.q_width() + 2 * attention.kv_width();
    let forms = moe.iter().flat_map(|moe| {
        [Some(moe.expert), moe.shared.map(|shared| shared.mlp)].into_iter().flatten()
    });
    // `wide`, `gate` and `out` of the widest form of MLP, which the attention uses too.
    let widths = |mlp: &Mlp| match mlp {
        Mlp::Gated { gate_up: GateUp::Fused(_), width, .. } => (2 * width, *width, *width),
        Mlp::Gated { width, .. } | Mlp::Plain { width, .. } => (*width, *width, 0),
    };
    let (mut wide, mut gate, mut out) = widths(mlp);
    for (w, g, o) in forms.map(|form| widths(&form)) {
        (wide, gate, out) = (wide.max(w), gate.max(g), out.max(o));
    }
    if let Qkv::Fused { .. } = attention.qkv {
        wide = wide.max(attended);
    }
    let widest = (*hidden).max(gate).max(attention.q_width());
    let scores = moe.as_ref().map_or(0, |moe| moe.count);
    let columns = attended + wide.max(*hidden) + gate + out.max(*hidden) + widest + hidden + scores;
    let kv = 2 * attention.kv_width().next_multiple_of(16);
    // A window's cache grows by whole blocks of positions.
    let positions = windows_per_chunk(seqlen) * seqlen.next_multiple_of(64);
    (chunk_tokens * columns + caches * positions * kv) as u64 * F32
        + gptq_compute::KvMemory::SLACK as u64
}

/// Bytes of the products of a sequence's keys with distances, and of a tile's scores.
fn distance_products(spec: &Spec, seqlen: usize) -> u64 {
    const TILE: usize = 64;
    spec.attention.relative.map_or(0, |relative| {
        let rows = (2 * relative.span).min(2 * seqlen);
        (seqlen * rows + TILE * (seqlen + rows)) as u64 * F32
    })
}

/// Bytes of the Hessian of projections that read distances beside tokens.
fn distance_hessian(spec: &Spec) -> u64 {
    let shared = spec.attention.relative.is_some_and(|relative| !relative.shared().is_empty());
    if shared { (spec.hidden * spec.hidden) as u64 * F32 } else { 0 }
}

/// Codes, scales, zero points and indices of a quantized linear.
fn packed_bytes(linear: &LinearSpec, settings: &ModuleSettings) -> u64 {
    let (inputs, outputs) = (linear.in_features as u64, linear.out_features as u64);
    let groups = linear_shape(settings, linear).groups() as u64;
    inputs * outputs * u64::from(settings.bits.as_u32()) / 8 + groups * outputs * 3 + inputs * F32
}

/// Bytes of a float weight when it is loaded for computing.
fn float_bytes(checkpoint: &Checkpoint, linear: &LinearSpec) -> u64 {
    let info = checkpoint.tensors.info(&format!("{}.weight", linear.module));
    match info.map(|info| info.dtype) {
        Ok(DType::F16 | DType::BF16) if !linear.transposed => 2,
        _ => F32,
    }
}
