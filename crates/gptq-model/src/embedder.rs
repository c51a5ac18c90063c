//! From token ids to the residual stream before the first block.

use std::mem::swap;
use std::sync::Arc;

use gptq_compute::{
    DenseMatrix, Linear, Matrix, Norm, SharedBytes, Tensor, add_scaled, embed, linear, norm, scale,
};
use gptq_format::gguf::{GgmlType, dequantize_rows};
use gptq_format::{Checkpoint, DType};

use crate::load::{LinearSource, Loader};
use crate::spec::{Positions, Spec};
use crate::state::Ctx;
use crate::{ModelError, Result};

/// The table of token embeddings `[vocab, width]`.
pub(crate) enum Tokens {
    /// Floats as stored.
    Floats(DenseMatrix),
    /// The rows of blocks of a GGUF file, decoded as they are looked up.
    Blocks { dtype: GgmlType, bytes: SharedBytes, width: usize, row_bytes: usize },
}

impl Tokens {
    fn load(loader: &Loader<'_>, name: &str, source: LinearSource) -> Result<Self> {
        let Spec { vocab, embedding, .. } = loader.spec;
        let width = embedding.width;
        let store = &loader.checkpoint.tensors;
        let info = loader.check_shape(name, &[*vocab, width])?;
        let (DType::Ggml(dtype), Some(_)) = (info.dtype, store.code_format(name)) else {
            return Ok(Self::Floats(loader.matrix(name, *vocab, width, source)?));
        };
        store.check_finite(name)?;
        let bytes: SharedBytes = if source == LinearSource::Copied {
            let mut bytes = vec![0; info.bytes];
            store.copy_bytes(name, 0, &mut bytes)?;
            Arc::new(bytes)
        } else {
            Arc::new(store.bytes(name)?)
        };
        Ok(Self::Blocks { dtype, bytes, width, row_bytes: info.bytes / (*vocab).max(1) })
    }

    /// The rows of `ids`, checked to be below `vocab`, in `out` `[ids.len(), width]`.
    fn look_up(&self, ids: &[u32], out: &mut Tensor) {
        match self {
            Self::Floats(table) => embed(table, ids, out),
            Self::Blocks { dtype, bytes, width, row_bytes } => {
                let bytes = (**bytes).as_ref();
                out.resize(ids.len(), *width);
                for (row, &id) in ids.iter().enumerate() {
                    let stored = &bytes[id as usize * row_bytes..][..*row_bytes];
                    // The type has codes, and rows are whole blocks.
                    dequantize_rows(*dtype, stored, out.row_mut(row)).expect("a row of blocks");
                }
            }
        }
    }
}

/// Token and position embedding and what else happens before the first block.
pub struct Embedder {
    spec: Arc<Spec>,
    pub(crate) tokens: Tokens,
    types: Option<DenseMatrix>,
    positions: Option<DenseMatrix>,
    norm: Option<Norm>,
    project_in: Option<Linear>,
}

impl Embedder {
    /// Loads the embedding: [`LinearSource::Mapped`] leaves it in the mapped file where its type allows,
    /// [`LinearSource::Copied`] copies it, so that the file leaves no resident pages behind.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape than the spec asks for.
    pub fn load(checkpoint: &Checkpoint, spec: &Arc<Spec>, source: LinearSource) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let Spec { base, embedding, hidden, .. } = &**spec;
        let weight = |name: &str| format!("{base}{name}.weight");
        let width = if embedding.project_sum { embedding.width } else { *hidden };
        let positions = match spec.positions {
            Positions::Learned { name, offset, .. } => {
                let rows = spec.max_positions + offset;
                Some(loader.matrix(&weight(name), rows, width, source)?)
            }
            Positions::Rotary(_) | Positions::Alibi { .. } | Positions::None => None,
        };
        let types =
            embedding.types.map(|(name, rows)| loader.matrix(&weight(name), rows, width, source));
        let norm =
            embedding.norm.map(|name| loader.norm(&format!("{base}{name}"), *hidden, spec.norm));
        let project_in = embedding.project_in.map(|name| {
            let matrix = loader.matrix(&weight(name), *hidden, embedding.width, source)?;
            Ok::<_, ModelError>(Linear { weight: Matrix::Dense(matrix), bias: None })
        });
        Ok(Self {
            tokens: Tokens::load(&loader, &weight(embedding.name), source)?,
            positions,
            types: types.transpose()?,
            norm: norm.transpose()?,
            project_in: project_in.transpose()?,
            spec: Arc::clone(spec),
        })
    }

    /// The residual stream before the first block: `ids` and `positions` `[rows]` to `out` `[rows, hidden]`. All tokens are
    /// of the first type where the family has types.
    ///
    /// # Errors
    /// An id outside the vocabulary, or a position beyond a table of learned positions.
    pub fn forward(
        &self,
        ctx: &mut Ctx,
        ids: &[u32],
        positions: &[u32],
        out: &mut Tensor,
    ) -> Result<()> {
        self.forward_typed(ctx, ids, &[], positions, out)
    }

    /// As [`Embedder::forward`] with the type of each token (sentence A or B) `[rows]`; with no `types` all are of the first.
    ///
    /// # Errors
    /// As [`Embedder::forward`]; a type that the family does not have.
    pub fn forward_typed(
        &self,
        ctx: &mut Ctx,
        ids: &[u32],
        types: &[u32],
        positions: &[u32],
        out: &mut Tensor,
    ) -> Result<()> {
        self.check(ids, types, positions)?;
        let pool = Arc::clone(&ctx.pool);
        self.tokens.look_up(ids, out);
        if self.spec.embedding.scale != 1.0 {
            scale(&pool, out, self.spec.embedding.scale);
        }
        let sum_first = self.spec.embedding.project_sum;
        let project = |ctx: &mut Ctx, out: &mut Tensor, now: bool| {
            if let Some(project_in) = self.project_in.as_ref().filter(|_| now) {
                linear(&pool, out, &mut [(project_in, &mut ctx.spare)], &mut ctx.scratch);
                swap(out, &mut ctx.spare);
            }
        };
        project(ctx, out, !sum_first);
        if let Some(table) = &self.types {
            ctx.rows.clear();
            ctx.rows.extend((0..ids.len()).map(|row| types.get(row).copied().unwrap_or(0)));
            embed(table, &ctx.rows, &mut ctx.spare);
            add_scaled(&pool, out, &ctx.spare, 1.0);
        }
        if let (Some(table), Positions::Learned { offset, padding, .. }) =
            (&self.positions, &self.spec.positions)
        {
            let row = |(&id, &position)| match *padding {
                Some(padding) if padding == id => padding,
                _ => position + *offset as u32,
            };
            ctx.rows.clear();
            ctx.rows.extend(ids.iter().zip(positions).map(row));
            embed(table, &ctx.rows, &mut ctx.spare);
            add_scaled(&pool, out, &ctx.spare, 1.0);
        }
        project(ctx, out, sum_first);
        if let Some(embedding_norm) = &self.norm {
            norm(&pool, out, embedding_norm, &mut ctx.spare);
            swap(out, &mut ctx.spare);
        }
        Ok(())
    }

    fn check(&self, ids: &[u32], types: &[u32], positions: &[u32]) -> Result<()> {
        let vocab = self.spec.vocab;
        if let Some((index, &id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
            return Err(ModelError::Token { id, index, vocab });
        }
        let (rows, typed) = (ids.len(), types.len());
        if rows != positions.len() || (typed != 0 && typed != rows) {
            let positions = positions.len();
            return Err(ModelError::Batch(format!(
                "{rows} ids with {positions} positions and {typed} token types"
            )));
        }
        let known = self.spec.embedding.types.map_or(1, |(_, count)| count);
        if let Some(&kind) = types.iter().find(|&&kind| kind as usize >= known) {
            return Err(ModelError::TokenType { kind, known });
        }
        let end = positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.spec.check_positions(end)
    }
}
