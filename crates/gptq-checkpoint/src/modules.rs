//! The linears of a model, and which of a checkpoint's tensors belong to them.

use std::collections::BTreeMap;

use gptq_format::{Checkpoint, TensorStore};
use gptq_model::{LinearSpec, Spec};

/// The parts of a quantized linear in a checkpoint.
pub(crate) const PARTS: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// All linears of the blocks and the head where it is not tied, in the order in which they run.
pub(crate) fn linears(spec: &Spec) -> Vec<LinearSpec> {
    let mut all: Vec<LinearSpec> = (0..spec.layer_count())
        .flat_map(|layer| spec.stages(layer))
        .flat_map(|stage| stage.linears)
        .collect();
    all.extend(spec.head_linear().filter(|_| !spec.head.tied));
    all
}

/// The module and part of a tensor that belongs to a quantized linear; a bias belongs to it too.
pub(crate) fn quantized_part<'a>(
    store: &TensorStore,
    tensor: &'a str,
) -> Option<(&'a str, &'a str)> {
    let (module, part) = tensor.rsplit_once('.')?;
    let belongs = PARTS.contains(&part) || part == "bias";
    (belongs && store.contains(&format!("{module}.qweight"))).then_some((module, part))
}

/// Names of all modules with a `qweight`: those of `linears` first and in their order, then the others by name.
pub(crate) fn quantized(checkpoint: &Checkpoint, linears: &[LinearSpec]) -> Vec<String> {
    let order: BTreeMap<&str, usize> =
        linears.iter().enumerate().map(|(at, linear)| (linear.module.as_str(), at)).collect();
    let mut names: Vec<&str> =
        checkpoint.tensors.names().filter_map(|name| name.strip_suffix(".qweight")).collect();
    names.sort_by_key(|name| (order.get(name).copied().unwrap_or(usize::MAX), natural(name)));
    names.into_iter().map(str::to_owned).collect()
}

/// Sorts `layers.10` behind `layers.9`.
pub(crate) fn natural(name: &str) -> Vec<(u64, &str)> {
    name.split('.')
        .map(|part| (part.parse().map_or(0, |n: u64| n.saturating_add(1)), part))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sort_as_numbers() {
        let mut names = vec!["a.10.x", "a.9.y", "a.9.x", "a.18446744073709551615.x"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["a.9.x", "a.9.y", "a.10.x", "a.18446744073709551615.x"]);
    }
}
