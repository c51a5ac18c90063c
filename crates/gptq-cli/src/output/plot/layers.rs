//! Plots over the layers of a run: the loss, and a map of the relative output error over layers and
//! modules.

use std::collections::BTreeMap;

use gptq_quantize::report::ModuleRecord;

use super::map::{HeatMap, range};
use super::svg::{BOTTOM, CHART_WIDTH, LEFT, Svg, TOP, chart_height, legend_width};

/// The loss over the layers, a line for each kind of module, with a logarithmic axis. Losses that
/// are not positive and finite leave a gap.
pub(crate) fn loss_by_layer(records: &[ModuleRecord]) -> String {
    lines("Loss per layer", &Kinds::of(records, |record| record.loss))
}

/// The sum of the losses of each layer, a line for each run. Runs that weigh tokens differently, or move weights before
/// they round them, have losses of different things, which the title says.
pub(crate) fn loss_by_run(runs: &[(&str, &[ModuleRecord])]) -> String {
    let layers = |records: &[ModuleRecord]| records.iter().map(|r| r.layer + 1).max().unwrap_or(0);
    let values = runs.iter().map(|(name, records)| {
        let mut sums = vec![0.0; layers(records)];
        for record in *records {
            sums[record.layer] += record.loss;
        }
        let valid = |sum: &f64| sum.is_finite() && *sum > 0.0;
        ((*name).to_owned(), sums.into_iter().map(|sum| Some(sum).filter(valid)).collect())
    });
    let values: Vec<(String, Vec<Option<f64>>)> = values.collect();
    let title = "Loss per layer, on the calibration tokens as each run weighs them";
    lines(title, &Kinds { layers: runs.iter().map(|(_, r)| layers(r)).max().unwrap_or(0), values })
}

fn lines(title: &str, kinds: &Kinds) -> String {
    let height = chart_height(kinds.values.len());
    let legend = legend_width(kinds.values.iter().map(|(kind, _)| kind.as_str()));
    let mut svg = Svg::new(title, LEFT + CHART_WIDTH + legend, TOP + height + BOTTOM);
    let Some((low, high)) = kinds.decades() else {
        return svg.empty();
    };
    let x = |layer: usize| LEFT + CHART_WIDTH * (layer as f64 + 0.5) / kinds.layers as f64;
    let y = |value: f64| TOP + height * (high - value.log10()) / (high - low);
    decades(&mut svg, low, high, y);
    layer_labels(&mut svg, kinds.layers, TOP + height, x);
    for (index, (kind, values)) in kinds.values.iter().enumerate() {
        let point = |(layer, value): (usize, &Option<f64>)| {
            let value = (*value)?;
            let label = format!("layer {} {kind}: {value:.3e}", layer + 1);
            Some((x(layer), y(value), label))
        };
        let points: Vec<_> = values.iter().enumerate().map(point).collect();
        svg.series(index, kind, &points);
    }
    svg.finish()
}

/// Relative output error of every module: layers from left to right, kinds of modules from top to
/// bottom.
pub(crate) fn error_map(records: &[ModuleRecord]) -> String {
    let kinds = Kinds::of(records, |record| record.relative_output_error.unwrap_or(f64::NAN));
    let map = HeatMap {
        title: "Relative output error",
        rows: &kinds.values,
        columns: kinds.layers,
        name: &|layer| format!("layer {}", layer + 1),
        numbers: false,
    };
    map.draw(|svg, bottom, x| layer_labels(svg, kinds.layers, bottom, x))
}

/// Values by kind of module and layer. The numbered modules of a kind (experts) are averaged.
struct Kinds {
    layers: usize,
    /// In the order in which the kinds first appear; a positive finite value or none for each
    /// layer.
    values: Vec<(String, Vec<Option<f64>>)>,
}

impl Kinds {
    fn of(records: &[ModuleRecord], value: impl Fn(&ModuleRecord) -> f64) -> Self {
        let layers = records.iter().map(|record| record.layer + 1).max().unwrap_or(0);
        let mut order: Vec<String> = Vec::new();
        let mut sums: BTreeMap<(String, usize), (f64, u32)> = BTreeMap::new();
        for record in records {
            let kind = kind(&record.module);
            if !order.contains(&kind) {
                order.push(kind.clone());
            }
            let sum = sums.entry((kind, record.layer)).or_default();
            *sum = (sum.0 + value(record), sum.1 + 1);
        }
        let mean = |kind: &str, layer: usize| {
            let (sum, count) = sums.get(&(kind.to_owned(), layer))?;
            Some(sum / f64::from(*count)).filter(|mean| mean.is_finite() && *mean > 0.0)
        };
        let values = order.into_iter().map(|kind| {
            let row = (0..layers).map(|layer| mean(&kind, layer)).collect();
            (kind, row)
        });
        Self { layers, values: values.collect() }
    }

    /// The range, widened to whole decades.
    fn decades(&self) -> Option<(f64, f64)> {
        let (low, high) = range(&self.values)?;
        let (low, high) = (low.floor(), high.ceil());
        Some((low, if high > low { high } else { low + 1.0 }))
    }
}

/// A module's name with its numbers left out: `mlp.experts.17.up_proj` is `mlp.experts.*.up_proj`.
fn kind(module: &str) -> String {
    let numbered = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let parts: Vec<&str> =
        module.split('.').map(|part| if numbered(part) { "*" } else { part }).collect();
    parts.join(".")
}

/// Grid lines and labels at whole decades of `low..=high`; where there are few, also at 2 and
/// 5.
fn decades(svg: &mut Svg, low: f64, high: f64, y: impl Fn(f64) -> f64) {
    let steps: &[f64] = if high - low <= 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let every = ((high - low) / 10.0).ceil().max(1.0) as usize;
    for decade in (low as i32..=high as i32).step_by(every) {
        for step in steps {
            let value = step * 10f64.powi(decade);
            if value.log10() > high {
                continue;
            }
            svg.level(y(value), &format!("{value:.0e}"));
        }
    }
}

/// Layer numbers, from 1, under the chart: at most some twenty.
fn layer_labels(svg: &mut Svg, layers: usize, bottom: f64, x: impl Fn(usize) -> f64) {
    let every = layers.div_ceil(20).max(1);
    for layer in (0..layers).step_by(every) {
        svg.text(x(layer), bottom + 16.0, "middle", &(layer + 1).to_string());
    }
    let middle = if layers == 0 { LEFT } else { f64::midpoint(x(0), x(layers - 1)) };
    svg.text(middle, bottom + 34.0, "middle", "layer");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(layer: usize, module: &str, loss: f64) -> ModuleRecord {
        ModuleRecord {
            layer,
            module: module.into(),
            shape: [8, 8],
            bits: 4,
            group_size: -1,
            loss,
            relative_output_error: Some(loss / 10.0),
            damp_percent: 0.05,
            damp_tries: 1,
            shrink: 0.0,
            nsamples: 1,
            expert: None,
            awq: None,
            seconds: 0.0,
            rss_bytes: None,
        }
    }

    fn run() -> Vec<ModuleRecord> {
        let names = [
            "self_attn.q_proj",
            "self_attn.v_proj",
            "mlp.experts.0.up_proj",
            "mlp.experts.1.up_proj",
        ];
        let of = |layer: usize| {
            names
                .iter()
                .enumerate()
                .map(move |(index, name)| record(layer, name, 1e-3 * (layer + index + 1) as f64))
        };
        (0..24).flat_map(of).collect()
    }

    #[test]
    fn plots_have_a_line_a_kind_and_a_cell_a_layer() {
        let svg = loss_by_layer(&run());
        assert_eq!(svg.matches("fill=\"none\"").count(), 3);
        assert_eq!(svg.matches("<circle").count(), 3 * 24);
        assert!(svg.contains("mlp.experts.*.up_proj"));
        let map = error_map(&run());
        assert_eq!(map.matches("<title>").count(), 3 * 24);
        assert!(!(svg + &map).contains("NaN"));
    }

    #[test]
    fn hostile_names_and_values_are_harmless() {
        let odd = [
            record(0, "<script>&\"\u{1}", 1.0),
            record(1, "b", 0.0),
            record(2, "b", f64::NAN),
            record(3, "b", f64::INFINITY),
        ];
        for svg in [loss_by_layer(&odd), error_map(&odd)] {
            assert!(svg.contains("&lt;script&gt;&amp;&quot; "), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        for svg in [loss_by_layer(&[]), error_map(&[]), loss_by_layer(&odd[1..])] {
            assert!(svg.contains("no values") && svg.ends_with("</svg>\n"));
        }
    }

    #[test]
    fn equal_losses_still_have_an_axis() {
        let svg = loss_by_layer(&[record(0, "a", 1e-3), record(1, "a", 1e-3)]);
        assert!(svg.contains("1e-3") && svg.contains("1e-2"));
    }
}
