//! What flows through a block and what is reused from call to call.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{LayerKv, Pool, Scratch, Span, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::moe::MoeState;
use crate::profile::{Op, Profile};
use crate::rope::RopeTables;
use crate::spec::Spec;
use crate::stages::Stage;
use crate::{ModelError, Result};

/// What running a block needs besides weights and state: threads, tables and buffers that are reused from call to call.
pub struct Ctx {
    /// The threads.
    pub pool: Arc<Pool>,
    /// Buffers of the kernels.
    pub scratch: Scratch,
    /// Where time is noted down, if it is.
    pub profile: Option<Box<Profile>>,
    pub(crate) spare: Tensor,
    pub(crate) rows: Vec<u32>,
    pub(crate) ropes: RopeTables,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) wide: Tensor,
    pub(crate) gate: Tensor,
    pub(crate) out: Tensor,
    pub(crate) scores: Tensor,
    pub(crate) positions: Vec<u32>,
}

impl Ctx {
    /// Empty buffers; they grow to what is needed on first use.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            scratch: Scratch::default(),
            profile: None,
            spare: Tensor::default(),
            rows: Vec::new(),
            ropes: RopeTables::default(),
            q: Tensor::default(),
            k: Tensor::default(),
            v: Tensor::default(),
            wide: Tensor::default(),
            gate: Tensor::default(),
            out: Tensor::default(),
            scores: Tensor::default(),
            positions: Vec::new(),
        }
    }

    /// Notes that `op` has ended, if somebody wants to know.
    pub(crate) fn lap(&mut self, op: Op, bytes: impl FnOnce() -> usize) {
        if let Some(profile) = &mut self.profile {
            profile.lap(op, bytes());
        }
    }
}

/// How activations are kept between the stages of a calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationType {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded to half precision, in half the memory. Magnitudes beyond 65504 do not fit.
    F16,
}

impl ActivationType {
    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<f16>(),
        }
    }
}

/// The activations of some rows (the tokens of one or several sequences) on their way through a block.
#[derive(Default)]
pub struct BlockState {
    /// The residual stream `[rows, hidden]`: before [`crate::Block::begin`] the block's input, after the last stage its output.
    pub hidden: Tensor,
    /// Input of the next stage `[rows, in_features of the stage]`; of an expert's stages only the rows routed to it.
    pub input: Tensor,
    /// Input that both sublayers of a parallel block share, kept while the attention runs.
    pub(crate) shared: Tensor,
    /// Output of the attention of a parallel block, kept while the MLP runs; or of the convolution beside a block.
    pub(crate) carry: Tensor,
    /// The MLP's input and output while its experts run.
    pub(crate) moe: MoeState,
}

impl BlockState {
    /// A state whose stream is `hidden` `[rows, hidden]`.
    pub fn new(hidden: Tensor) -> Self {
        Self { hidden, ..Self::default() }
    }

    /// The rows of the state that the input of an expert's `stage` consists of, while that stage comes next; `None` where it
    /// has all rows.
    pub fn routed_rows(&self, stage: Stage) -> Option<Vec<u32>> {
        stage.expert().map(|expert| self.moe.rows(expert))
    }

    /// Size of its buffers in bytes.
    pub fn bytes(&self) -> usize {
        [&self.hidden, &self.input, &self.shared, &self.carry]
            .iter()
            .map(|t| t.capacity_bytes())
            .sum::<usize>()
            + self.moe.bytes()
    }

    /// Most bytes that [`BlockState::save`] writes for `rows` rows of a model; with f32 its buffers need as many.
    pub fn saved_bytes(spec: &Spec, rows: usize, kind: ActivationType) -> usize {
        let linears = (0..spec.layer_count()).flat_map(|layer| spec.stages(layer));
        let inputs = linears.filter_map(|stage| stage.linears.first().map(|l| l.in_features));
        // `shared` or the stage's input, and `carry`.
        let parallel = if spec.residual.parallel { 2 * spec.hidden } else { 0 };
        let convolved = spec.residual.convolution.map_or(0, |_| spec.hidden);
        let width = spec.hidden + inputs.max().unwrap_or(0) + parallel + convolved;
        let moe =
            spec.moe.as_ref().map_or(0, |moe| MoeState::saved_bytes(moe, spec.hidden, rows, kind));
        // Shapes of six tensors, lengths of three lists.
        let headers = (6 * 2 + 3) * size_of::<u64>();
        rows * width * kind.size() + moe + headers
    }

    /// Writes all of it, for [`BlockState::restore`] in the same process.
    ///
    /// # Errors
    /// If writing fails, or a number is too large for `kind` ([`io::ErrorKind::InvalidData`]).
    pub fn save(&self, to: &mut impl io::Write, kind: ActivationType) -> io::Result<()> {
        for tensor in [&self.hidden, &self.input, &self.shared, &self.carry] {
            save_tensor(tensor, to, kind)?;
        }
        self.moe.save(to, kind)
    }

    /// Reads what [`BlockState::save`] wrote with the same `kind`.
    ///
    /// # Errors
    /// If reading fails.
    pub fn restore(&mut self, from: &mut impl io::Read, kind: ActivationType) -> io::Result<()> {
        for tensor in [&mut self.hidden, &mut self.input, &mut self.shared, &mut self.carry] {
            restore_tensor(tensor, from, kind)?;
        }
        self.moe.restore(from, kind)
    }
}

/// Numbers that are converted at a time.
const PIECE: usize = 4096;

pub(crate) fn save_tensor(
    tensor: &Tensor,
    to: &mut impl io::Write,
    kind: ActivationType,
) -> io::Result<()> {
    let shape = [tensor.rows() as u64, tensor.cols() as u64];
    to.write_all(bytemuck::cast_slice(&shape))?;
    if kind == ActivationType::F32 {
        return to.write_all(bytemuck::cast_slice(tensor.as_slice()));
    }
    let mut halves = [f16::ZERO; PIECE];
    for floats in tensor.as_slice().chunks(PIECE) {
        let halves = &mut halves[..floats.len()];
        halves.convert_from_f32_slice(floats);
        // What is not finite already is reported where it was computed.
        if let Some(at) =
            (0..floats.len()).find(|&i| floats[i].is_finite() && !halves[i].is_finite())
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("an activation of {:e} does not fit f16", floats[at]),
            ));
        }
        to.write_all(bytemuck::cast_slice(halves))?;
    }
    Ok(())
}

pub(crate) fn restore_tensor(
    tensor: &mut Tensor,
    from: &mut impl io::Read,
    kind: ActivationType,
) -> io::Result<()> {
    let mut shape = [0u64; 2];
    from.read_exact(bytemuck::cast_slice_mut(&mut shape))?;
    tensor.resize(shape[0] as usize, shape[1] as usize);
    if kind == ActivationType::F32 {
        return from.read_exact(bytemuck::cast_slice_mut(tensor.as_mut_slice()));
    }
    let mut halves = [f16::ZERO; PIECE];
    for floats in tensor.as_mut_slice().chunks_mut(PIECE) {
        let halves = &mut halves[..floats.len()];
        from.read_exact(bytemuck::cast_slice_mut(halves))?;
        halves.convert_to_f32_slice(floats);
    }
    Ok(())
}

/// The rows of one sequence in a [`BlockState`], and its keys and values in this block.
pub struct SeqSpan<'a> {
    /// Rows of the state; the spans of a call cover all rows in order.
    pub rows: Range<usize>,
    /// Keys and values of the tokens before these rows; the first row's position is its length.
    pub kv: &'a mut LayerKv,
}

impl Span for SeqSpan<'_> {
    fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    fn kv(&self) -> &LayerKv {
        self.kv
    }
}

impl SeqSpan<'_> {
    /// Positions of the rows; valid until they are appended to the cache.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.kv.len()..self.kv.len() + self.rows.len()
    }
}

/// Checks that the spans cover all rows of a state, in order and none empty.
pub(crate) fn check_spans(seqs: &[SeqSpan<'_>], rows: usize) -> Result<()> {
    let mut next = 0;
    for seq in seqs {
        if seq.rows.start != next || seq.rows.is_empty() {
            break;
        }
        next = seq.rows.end;
    }
    let covered = seqs.last().is_some_and(|last| last.rows.end == next && next == rows);
    if covered {
        return Ok(());
    }
    let spans: Vec<Range<usize>> = seqs.iter().map(|seq| seq.rows.clone()).collect();
    Err(ModelError::Batch(format!(
        "the sequences' rows {spans:?} do not cover the {rows} rows of the state in order"
    )))
}

/// An empty list of spans in the memory of `spans`, for other caches: a batch takes one list per block of the model, and
/// decoding must not allocate. Collecting what comes out of a vector of the same element layout reuses its buffer.
pub(crate) fn recycle<'a>(mut spans: Vec<SeqSpan<'_>>) -> Vec<SeqSpan<'a>> {
    spans.clear();
    spans.into_iter().map_while(|_| None).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_whole() {
        let tensor = |rows: usize, cols: usize, first: f32| {
            Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| first + i as f32).collect())
        };
        let mut state = BlockState::new(tensor(3, 4, 1.0));
        (state.input, state.carry) = (tensor(2, 7, 100.0), tensor(3, 4, -9.0));
        state.moe.fill(&[(0, 0.25), (2, 0.75), (1, f32::MIN_POSITIVE)]);
        // Every number of the state is a half precision number.
        for kind in [ActivationType::F32, ActivationType::F16] {
            comes_back(&state, kind);
        }
        state.hidden = tensor(1, 1, 7e4);
        let error = state.save(&mut Vec::new(), ActivationType::F16).unwrap_err();
        assert_eq!(error.to_string(), "an activation of 7e4 does not fit f16");
    }

    fn comes_back(state: &BlockState, kind: ActivationType) {
        let tensor =
            |rows: usize, cols: usize| Tensor::from_vec(rows, cols, vec![0.0; rows * cols]);
        let mut bytes = Vec::new();
        state.save(&mut bytes, kind).unwrap();
        let mut back = BlockState::new(tensor(9, 1));
        back.restore(&mut bytes.as_slice(), kind).unwrap();
        for (got, want) in [
            (&back.hidden, &state.hidden),
            (&back.input, &state.input),
            (&back.shared, &state.shared),
            (&back.carry, &state.carry),
        ] {
            assert_eq!((got.rows(), got.cols()), (want.rows(), want.cols()));
            assert_eq!(got.as_slice(), want.as_slice());
        }
        let mut again = Vec::new();
        back.save(&mut again, kind).unwrap();
        assert_eq!(bytes, again, "the experts' part too");
        assert!(back.restore(&mut &bytes[..bytes.len() - 1], kind).is_err(), "a short file");
    }
}
