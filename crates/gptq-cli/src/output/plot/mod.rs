//! Plots as SVG files, drawn without help: over the layers of a run, and over the runs of a sweep.

mod curves;
mod layers;
mod map;
mod svg;
mod texts;

pub(crate) use curves::{Curves, Point, curves};
pub(crate) use layers::{error_map, loss_by_layer, loss_by_run};
pub(crate) use texts::text_map;
