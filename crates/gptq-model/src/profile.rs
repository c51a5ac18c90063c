//! Where the time of a forward call goes.

use std::time::Instant;

/// One fused operation of a forward call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Rows of the embedding, and what follows before the first block.
    Embed,
    /// The norm before the attention.
    Norm,
    /// Queries, keys and values in one pass.
    Qkv,
    /// Rotation (and norms) of queries and keys, and the keys and values put into the cache.
    Rotate,
    /// Attention over the cache.
    Attention,
    /// Output projection of the attention.
    AttentionOut,
    /// The sum with the stream and the norm before the MLP, in one pass; the router of experts.
    AddNorm,
    /// Gate and up projections in one pass.
    GateUp,
    /// Activation and gating.
    Activation,
    /// Down projection.
    Down,
    /// The sum with the stream.
    Add,
    /// Final norm.
    FinalNorm,
    /// Projection to logits.
    Head,
}

impl Op {
    /// All of them in the order in which they run.
    pub const ALL: [Self; 13] = [
        Self::Embed,
        Self::Norm,
        Self::Qkv,
        Self::Rotate,
        Self::Attention,
        Self::AttentionOut,
        Self::AddNorm,
        Self::GateUp,
        Self::Activation,
        Self::Down,
        Self::Add,
        Self::FinalNorm,
        Self::Head,
    ];

    /// A name for tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::Rotate => "rotate+cache",
            Self::Attention => "attention",
            Self::AttentionOut => "attention_out",
            Self::AddNorm => "add+norm",
            Self::GateUp => "gate+up",
            Self::Activation => "activation",
            Self::Down => "down",
            Self::Add => "add",
            Self::FinalNorm => "final_norm",
            Self::Head => "head",
        }
    }
}

/// What one operation cost in all.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OpCost {
    /// Times it ran.
    pub calls: usize,
    /// Wall time in seconds.
    pub seconds: f64,
    /// Bytes of weights and cache that it read.
    pub bytes: usize,
}

/// Adds up the costs of operations; put into [`crate::Ctx::profile`] to switch it on.
#[derive(Debug, Clone)]
pub struct Profile {
    last: Instant,
    costs: [OpCost; Op::ALL.len()],
}

impl Default for Profile {
    fn default() -> Self {
        Self { last: Instant::now(), costs: [OpCost::default(); Op::ALL.len()] }
    }
}

impl Profile {
    /// What `op` cost so far.
    pub fn cost(&self, op: Op) -> OpCost {
        self.costs[op as usize]
    }

    /// The time until the next operation ends is that operation's.
    pub fn start(&mut self) {
        self.last = Instant::now();
    }

    /// `op` has ended.
    pub(crate) fn lap(&mut self, op: Op, bytes: usize) {
        let now = Instant::now();
        let cost = &mut self.costs[op as usize];
        cost.calls += 1;
        cost.seconds += now.duration_since(self.last).as_secs_f64();
        cost.bytes += bytes;
        self.last = now;
    }
}
