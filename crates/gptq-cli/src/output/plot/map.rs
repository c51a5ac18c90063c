//! Heat maps.

use super::svg::{BOTTOM, CHARACTER, CHART_WIDTH, Svg, TOP, escape};

/// Values in rows and columns as colours, on a logarithmic scale. Pointing at a cell shows the value.
pub(super) struct HeatMap<'a> {
    pub(super) title: &'a str,
    /// From top to bottom; the values of each are positive and finite, or none.
    pub(super) rows: &'a [(String, Vec<Option<f64>>)],
    pub(super) columns: usize,
    /// The name of a column, shown with the value.
    pub(super) name: &'a dyn Fn(usize) -> String,
    /// Whether cells show their values.
    pub(super) numbers: bool,
}

impl HeatMap<'_> {
    /// The picture. `labels` writes under the map, given its bottom and the middle of each column.
    pub(super) fn draw(&self, labels: impl Fn(&mut Svg, f64, &dyn Fn(usize) -> f64)) -> String {
        let longest = self.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let left = LEFT_OF_MAP.max(longest as f64 * CHARACTER);
        let bottom = TOP + self.rows.len() as f64 * CELL_HEIGHT;
        let width = left + CHART_WIDTH + SCALE_WIDTH;
        let mut svg = Svg::new(self.title, width, bottom.max(TOP + MIN_SCALE) + BOTTOM);
        let Some((low, high)) = range(self.rows) else {
            return svg.empty();
        };
        let cell = CHART_WIDTH / self.columns as f64;
        let x = |column: usize| left + cell * (column as f64 + 0.5);
        let shade = |value: f64| {
            if high > low { (value.log10() - low) / (high - low) } else { 0.5 }
        };
        for (row, (name, values)) in self.rows.iter().enumerate() {
            let top = TOP + row as f64 * CELL_HEIGHT;
            let base = top + CELL_HEIGHT / 2.0 + 4.0;
            svg.text(left - 8.0, base, "end", name);
            for (column, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                svg.push(&format!(
                    "<rect x=\"{:.2}\" y=\"{top}\" width=\"{:.2}\" height=\"{}\" fill=\"{}\"><title>{} {}: {value:.3e}</title></rect>\n",
                    x(column) - cell / 2.0,
                    (cell - 1.0).max(cell * 0.9),
                    CELL_HEIGHT - 1.0,
                    viridis(shade(*value)),
                    escape(&(self.name)(column)),
                    escape(name)
                ));
                if self.numbers {
                    let ink = if shade(*value) > 0.6 { "#000" } else { "#fff" };
                    svg.push(&format!(
                        "<text x=\"{:.1}\" y=\"{base}\" text-anchor=\"middle\" style=\"fill:{ink}\">{value:.3}</text>\n",
                        x(column)
                    ));
                }
            }
        }
        labels(&mut svg, bottom, &x);
        let (left, height) = (left + CHART_WIDTH + 24.0, (bottom - TOP).max(MIN_SCALE));
        for step in 0..SCALE_STEPS {
            let share = step as f64 / (SCALE_STEPS - 1) as f64;
            let y = TOP + height * (1.0 - (step + 1) as f64 / SCALE_STEPS as f64);
            svg.push(&format!(
                "<rect x=\"{left}\" y=\"{y:.2}\" width=\"14\" height=\"{:.2}\" fill=\"{}\"/>\n",
                height / SCALE_STEPS as f64 + 0.5,
                viridis(share)
            ));
        }
        svg.text(left + 20.0, TOP + 10.0, "start", &format!("{:.1e}", 10f64.powf(high)));
        svg.text(left + 20.0, TOP + height, "start", &format!("{:.1e}", 10f64.powf(low)));
        svg.finish()
    }
}

/// Decimal logarithms of the smallest and largest value, `None` where there is no value.
pub(super) fn range(rows: &[(String, Vec<Option<f64>>)]) -> Option<(f64, f64)> {
    let all = rows.iter().flat_map(|(_, row)| row.iter().flatten()).map(|value| value.log10());
    all.fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((value.min(low), value.max(high)))
    })
}

/// The colour at `share` (0 dark, 1 light) of a scale of even steps in lightness, after
/// matplotlib's viridis.
fn viridis(share: f64) -> String {
    let place = share.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let below = (place as usize).min(VIRIDIS.len() - 2);
    let part = place - below as f64;
    let mix = |channel: usize| {
        let (a, b) = (VIRIDIS[below][channel], VIRIDIS[below + 1][channel]);
        (f64::from(a) + (f64::from(b) - f64::from(a)) * part).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

const VIRIDIS: [[u8; 3]; 5] =
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

const LEFT_OF_MAP: f64 = 180.0;
const CELL_HEIGHT: f64 = 26.0;
const MIN_SCALE: f64 = 120.0;
const SCALE_STEPS: usize = 40;
/// Room for the scale and its ends.
const SCALE_WIDTH: f64 = 110.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_colour_scale_has_its_ends() {
        assert_eq!(viridis(-1.0), "#440154");
        assert_eq!(viridis(0.5), "#21918c");
        assert_eq!(viridis(2.0), "#fde725");
    }
}
