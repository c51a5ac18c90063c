//! Whole sequences at once, without a cache that outlives the call: what encoders do, in both directions or one.

use std::ops::Range;

use gptq_compute::{LayerKv, Tensor};

use crate::model::{Model, Session};
use crate::spec::Positions;
use crate::state::SeqSpan;
use crate::{ModelError, Result};

/// One sequence for [`Model::encode`].
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeInput<'a> {
    /// Token ids, padding included.
    pub ids: &'a [u32],
    /// Type of each token (sentence A or B); empty: all of the first type.
    pub types: &'a [u32],
    /// Whether each token is real, on either side of the padding; empty: all are.
    pub mask: &'a [bool],
}

/// What [`Model::encode`] found.
#[derive(Debug, Clone, Copy)]
pub struct Encoded<'s> {
    /// The last hidden state, after the final norm: `[real tokens, hidden]`, the sequences one after the other.
    pub hidden: &'s Tensor,
    /// Rows of each sequence in `hidden`.
    pub rows: &'s [Range<usize>],
    /// The pooled output `[sequences, hidden]`, from each sequence's first real token; `None` for a model without pooler.
    pub pooled: Option<&'s Tensor>,
}

impl Model {
    /// Encodes whole sequences. Tokens that are not real are left out: they would be seen by nothing. The others keep the
    /// positions that they have in their padded sequence. Logits of the real tokens follow with [`Model::logits`].
    ///
    /// # Errors
    /// An id or type outside its table, too long a sequence for learned positions, types or a mask of another length than
    /// the ids, no real token, or padding between real tokens where positions are relative.
    pub fn encode<'s>(
        &self,
        session: &'s mut Session,
        batch: &[EncodeInput<'_>],
    ) -> Result<Encoded<'s>> {
        session.rows.clear();
        let mut rows = std::mem::take(&mut session.rows);
        self.gather(session, batch, &mut rows)?;
        let Session { ctx, state, ids, types, positions, caches, normalized, pooled, .. } = session;
        self.embedder.forward_typed(ctx, ids, types, positions, &mut state.hidden)?;
        let (kv_heads, head_dim) = (self.spec.attention.kv_heads, self.spec.attention.head_dim);
        caches.retain(|kv| (kv.kv_heads(), kv.head_dim()) == (kv_heads, head_dim));
        caches.resize_with(rows.len(), || LayerKv::new(kv_heads, head_dim));
        for block in &self.blocks {
            let spans = rows.iter().zip(&mut *caches).map(|(rows, kv)| {
                kv.clear();
                SeqSpan { rows: rows.clone(), kv }
            });
            block.forward(ctx, state, &mut spans.collect::<Vec<_>>())?;
        }
        self.head.normalize(ctx, &state.hidden, normalized);
        let has_pooled = self.head.pool(ctx, normalized, &rows, pooled);
        session.rows = rows;
        let Session { normalized, pooled, rows, .. } = &*session;
        Ok(Encoded { hidden: normalized, rows, pooled: has_pooled.then_some(pooled) })
    }

    /// Flattens the real tokens of `batch` into the session, and finds the rows of each sequence.
    fn gather(
        &self,
        session: &mut Session,
        batch: &[EncodeInput<'_>],
        rows: &mut Vec<Range<usize>>,
    ) -> Result<()> {
        let Session { ids, types, positions, .. } = session;
        ids.clear();
        types.clear();
        positions.clear();
        if batch.is_empty() {
            return Err(ModelError::Batch("no sequence to encode".to_owned()));
        }
        let (padding, masked) = match self.spec.positions {
            Positions::Learned { padding, masked, .. } => (padding, masked),
            Positions::Rotary(_) | Positions::Alibi { .. } | Positions::None => (None, true),
        };
        let typed = batch.iter().any(|input| !input.types.is_empty());
        for (index, EncodeInput { ids: all, types: kinds, mask }) in batch.iter().enumerate() {
            let fits = |len: usize| len == 0 || len == all.len();
            if !fits(kinds.len()) || !fits(mask.len()) {
                let (n, kinds, mask) = (all.len(), kinds.len(), mask.len());
                return Err(ModelError::Batch(format!(
                    "sequence {index}: {n} ids with {kinds} token types and a mask of {mask}"
                )));
            }
            let first = ids.len();
            // Padding tokens do not count where the family says so, whatever the mask, and masked ones neither in others.
            let mut next = 0;
            for (at, &id) in all.iter().enumerate() {
                let real = mask.get(at).copied().unwrap_or(true);
                let position = if padding == Some(id) { 0 } else { next };
                next += u32::from(padding != Some(id) && (real || masked));
                if real {
                    ids.push(id);
                    positions.push(position);
                    if typed {
                        types.push(kinds.get(at).copied().unwrap_or(0));
                    }
                }
            }
            if ids.len() == first {
                return Err(ModelError::Batch(format!("sequence {index} has no real token")));
            }
            let absolute = matches!(self.spec.positions, Positions::Learned { .. })
                && self.spec.attention.relative.is_none()
                && self.spec.residual.convolution.is_none();
            let new = &positions[first..];
            if !absolute && (new[new.len() - 1] - new[0]) as usize + 1 != new.len() {
                return Err(ModelError::Batch(format!(
                    "sequence {index} has padding between its tokens; put it at one end"
                )));
            }
            rows.push(first..ids.len());
        }
        Ok(())
    }
}
