//! What the user sees: data on stdout, all else on stderr.

pub(crate) mod json;
pub(crate) mod plot;
pub(crate) mod progress;
pub(crate) mod size;
pub(crate) mod table;
