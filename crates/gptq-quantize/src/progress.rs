//! How a run tells what it is doing. The pipeline calls, the command line draws; nothing here
//! prints.

use crate::report::{ModuleRecord, TuningRecord};

/// Receives the steps of a quantization run. Every method has an empty default, so that a caller
/// implements what it shows; `()` shows nothing. Calls come from one thread at a time, in the order
/// of the work.
pub trait Progress: Sync {
    /// A part of the work begins, for example `calibration`, `inputs`, `hessian`, `solve`, `write`.
    fn phase(&self, _name: &str) {}

    /// `done` of `total` steps of the current phase are over.
    fn phase_progress(&self, _done: usize, _total: usize) {}

    /// Block `index` (from 0) of `total` begins.
    fn block_started(&self, _index: usize, _total: usize) {}

    /// A linear was solved and packed.
    fn module_done(&self, _record: &ModuleRecord) {}

    /// Scales and norms of a block were tuned.
    fn block_tuned(&self, _record: &TuningRecord) {}

    /// Block `index` is finished and durable.
    fn block_done(&self, _index: usize) {}

    /// Whether to stop at the next block. Asked after every block.
    fn interrupted(&self) -> bool {
        false
    }
}

impl Progress for () {}
