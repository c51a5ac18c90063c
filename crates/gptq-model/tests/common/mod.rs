//! What the integration tests share: opening fixtures and running whole models.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::Path;
use std::sync::Arc;

use gptq_compute::{Pool, Tensor, argmax};
use gptq_format::{Checkpoint, Config};
use gptq_model::{Model, Rows, Sequence, Session};

pub(crate) fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
}

/// The checkpoint with another config file of its directory.
pub(crate) fn open_with(dir: &Path, config: &str) -> Checkpoint {
    let mut checkpoint = open(dir);
    checkpoint.config = Config::load(&dir.join(config)).unwrap();
    checkpoint
}

pub(crate) fn load(checkpoint: &Checkpoint) -> Model {
    Model::load(checkpoint).unwrap_or_else(|error| panic!("{}: {error}", checkpoint.path.display()))
}

pub(crate) fn session() -> Session {
    Session::new(Arc::new(Pool::new(2)))
}

/// Logits of all positions of `rows` sequences of equal length, in one batch.
pub(crate) fn logits(model: &Model, session: &mut Session, ids: &[u32], rows: usize) -> Tensor {
    let ids: Vec<&[u32]> = ids.chunks_exact(ids.len() / rows).collect();
    let mut batch: Vec<Sequence> = ids.iter().map(|_| Sequence::new(model.spec())).collect();
    model.forward(session, &mut batch, &ids).unwrap();
    model.logits(session, Rows::All).clone()
}

/// `prompt` and `count` greedy tokens, one at a time through the cache.
pub(crate) fn greedy(
    model: &Model,
    session: &mut Session,
    prompt: &[u32],
    count: usize,
) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    let mut batch = [Sequence::new(model.spec())];
    let mut new = prompt.to_vec();
    for _ in 0..count {
        model.forward(session, &mut batch, &[&new]).unwrap();
        let next = argmax(model.logits(session, Rows::Last).row(0)).unwrap() as u32;
        ids.push(next);
        new = vec![next];
    }
    ids
}
