//! Where the activations are kept between stages: in memory as they are, packed, or on disk.

use std::path::Path;

use gptq_model::{ActivationType, BlockState};

use super::Phases;
use super::scratch::{Scratch, not_kept};
use crate::error::Result;

/// The state of each chunk.
pub(super) enum States {
    Memory(Vec<BlockState>),
    /// As they are saved with this type: one chunk at a time is whole.
    Packed(Vec<Vec<u8>>, ActivationType),
    /// One chunk at a time is in memory.
    Disk(Scratch),
}

impl States {
    /// Nothing yet, to be kept as `self` is; `directory` is where files are made.
    pub(super) fn empty(&self, directory: &Path) -> Result<Self> {
        Ok(match self {
            Self::Memory(_) => Self::Memory(Vec::new()),
            Self::Packed(_, kind) => Self::Packed(Vec::new(), *kind),
            Self::Disk(scratch) => Self::Disk(scratch.another(directory)?),
        })
    }

    /// What the report calls the time that it takes.
    pub(super) fn phase(&self) -> &'static str {
        match self {
            Self::Memory(_) => "inputs",
            Self::Packed(..) => "packing",
            Self::Disk(_) => "scratch",
        }
    }

    /// Adds the state of chunk `index`, the next one.
    pub(super) fn push(&mut self, index: usize, state: BlockState) -> Result<()> {
        match self {
            Self::Memory(all) => all.push(state),
            Self::Packed(all, kind) => {
                let mut packed = Vec::new();
                pack(&state, *kind, &mut packed)?;
                all.push(packed);
            }
            Self::Disk(scratch) => scratch.store(index, &state)?,
        }
        Ok(())
    }

    /// Frees what is in memory.
    pub(super) fn clear(&mut self) {
        match self {
            Self::Memory(all) => all.clear(),
            Self::Packed(all, _) => all.clear(),
            Self::Disk(_) => {}
        }
    }

    /// The state of one chunk; `buffer` holds it where it comes from the disk.
    pub(super) fn get<'s>(
        &'s self,
        index: usize,
        buffer: &'s mut BlockState,
        phases: &mut Phases,
    ) -> Result<&'s BlockState> {
        match self {
            Self::Memory(all) => Ok(&all[index]),
            Self::Packed(all, kind) => {
                phases.time("packing", || unpack(&all[index], *kind, buffer))?;
                Ok(buffer)
            }
            Self::Disk(scratch) => {
                phases.time("scratch", || scratch.load(index, buffer))?;
                Ok(buffer)
            }
        }
    }
}

pub(super) fn pack(state: &BlockState, kind: ActivationType, packed: &mut Vec<u8>) -> Result<()> {
    packed.clear();
    state.save(packed, kind).map_err(|error| not_kept(error, Path::new("memory")))?;
    // Grown step by step, it may have room for twice as much.
    packed.shrink_to_fit();
    Ok(())
}

pub(super) fn unpack(packed: &[u8], kind: ActivationType, state: &mut BlockState) -> Result<()> {
    let mut bytes = packed;
    state.restore(&mut bytes, kind).map_err(|error| not_kept(error, Path::new("memory")))
}
