//! Curves over a linear axis, such as perplexity over bits per weight.

use super::svg::{BOTTOM, CHART_WIDTH, LEFT, Svg, TOP, chart_height, legend_width};

/// One value of a curve.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// Shown when it is pointed at, before the values.
    pub(crate) name: String,
}

/// What is drawn.
#[derive(Debug, Clone)]
pub(crate) struct Curves<'a> {
    pub(crate) title: &'a str,
    /// Under the axis of x.
    pub(crate) x_label: &'a str,
    /// Named curves; the points of each are joined in order of x.
    pub(crate) series: Vec<(String, Vec<Point>)>,
    /// A dashed line across, with its name.
    pub(crate) level: Option<(f64, &'a str)>,
}

/// Draws curves with a logarithmic axis of y. Values that are not positive and finite are left out.
pub(crate) fn curves(drawn: &Curves<'_>) -> String {
    let height = chart_height(drawn.series.len() + usize::from(drawn.level.is_some()));
    let legend = legend_width(drawn.series.iter().map(|(name, _)| name.as_str()));
    let mut svg = Svg::new(drawn.title, LEFT + CHART_WIDTH + legend, TOP + height + BOTTOM);
    let valid = |point: &&Point| point.y.is_finite() && point.y > 0.0 && point.x.is_finite();
    let points = || drawn.series.iter().flat_map(|(_, points)| points.iter().filter(valid));
    let level = drawn.level.filter(|(level, _)| level.is_finite() && *level > 0.0);
    let ys = points().map(|point| point.y).chain(level.map(|(level, _)| level));
    let (Some((low, high)), Some((left, right))) = (range(ys), range(points().map(|p| p.x))) else {
        return svg.empty();
    };
    let (low, high) = widened(low.ln(), high.ln());
    let (left, right) = widened(left, right);
    let x = |value: f64| LEFT + CHART_WIDTH * (value - left) / (right - left);
    let y = |value: f64| TOP + height * (high - value.ln()) / (high - low);
    for tick in log_ticks(low.exp(), high.exp()) {
        svg.level(y(tick), &number(tick));
    }
    let step = step(right - left);
    for value in multiples(step, left, right) {
        svg.text(x(value), TOP + height + 16.0, "middle", &number(value));
    }
    svg.text(LEFT + CHART_WIDTH / 2.0, TOP + height + 34.0, "middle", drawn.x_label);
    if let Some((level, name)) = level {
        let y = y(level);
        svg.push(&format!(
            "<path d=\"M{LEFT} {y:.1}h{CHART_WIDTH}\" stroke=\"#8c8c8c\" stroke-dasharray=\"6 4\"/>\n"
        ));
        svg.text(LEFT + CHART_WIDTH + 16.0, y + 4.0, "start", &format!("{name} {}", number(level)));
    }
    for (index, (name, points)) in drawn.series.iter().enumerate() {
        let mut sorted: Vec<&Point> = points.iter().filter(valid).collect();
        sorted.sort_by(|a, b| a.x.total_cmp(&b.x));
        let label = |p: &Point| format!("{}: {} at {:.3}", p.name, number(p.y), p.x);
        let line: Vec<_> = sorted.into_iter().map(|p| Some((x(p.x), y(p.y), label(p)))).collect();
        svg.series(index, name, &line);
    }
    svg.finish()
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((value.min(low), value.max(high)))
    })
}

/// The range with some air; never empty.
fn widened(low: f64, high: f64) -> (f64, f64) {
    let air = if high > low { 0.06 * (high - low) } else { 0.1 };
    (low - air, high + air)
}

/// A step of 1, 2 or 5 times a power of ten that fits four to ten times.
fn step(span: f64) -> f64 {
    let power = 10f64.powf((span / 10.0).log10().ceil());
    [0.2, 0.5]
        .into_iter()
        .map(|part| part * power)
        .find(|step| span / step <= 10.0)
        .unwrap_or(power)
}

/// The multiples of `step` from `low` to `high`.
fn multiples(step: f64, low: f64, high: f64) -> impl Iterator<Item = f64> {
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(move |index| index as f64 * step)
}

/// Round numbers between `low` and `high`: as many as are easily read.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let of = |steps: &[f64]| -> Vec<f64> {
        let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let all = decades.flat_map(|d| steps.iter().map(move |step| step * 10f64.powi(d)));
        all.filter(|tick| (low..=high).contains(tick)).collect()
    };
    let sets: [&[f64]; 4] = [
        &[1.0],
        &[1.0, 2.0, 5.0],
        &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        &[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    ];
    let enough = |ticks: &Vec<f64>| ticks.len() >= 4;
    let found = sets.into_iter().map(of).find(enough);
    found.unwrap_or_else(|| {
        let step = step(high - low);
        multiples(step, low, high).collect()
    })
}

fn number(value: f64) -> String {
    let digits = value.abs().log10().floor();
    if value == 0.0 {
        "0".to_owned()
    } else if !(-3.0..5.0).contains(&digits) {
        format!("{value:.1e}")
    } else {
        let decimals = (2.0 - digits).clamp(0.0, 6.0) as usize;
        let text = format!("{value:.decimals$}");
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(x: f64, y: f64) -> Point {
        Point { x, y, name: "row".into() }
    }

    fn drawn(points: Vec<Point>) -> String {
        let series = vec![("a<b".to_owned(), points)];
        let level = Some((17.8, "original"));
        curves(&Curves { title: "t", x_label: "bits", series, level })
    }

    #[test]
    fn ticks_are_round_and_neither_few_nor_many() {
        assert_eq!(log_ticks(17.0, 60.0), [18.0, 20.0, 25.0, 30.0, 35.0, 40.0, 50.0, 60.0]);
        assert_eq!(log_ticks(0.9, 1e4), [1.0, 10.0, 100.0, 1e3, 1e4]);
        for (low, high) in [(1e-4, 1e7), (3.0, 3.3), (20.0, 21.0), (99.0, 1e3), (1.0, 2.0)] {
            let count = log_ticks(low, high).len();
            assert!((4..=12).contains(&count), "{low} {high}: {count}");
        }
        assert_eq!((step(2.0), step(0.7), step(10.0)), (0.2, 0.1, 1.0));
    }

    #[test]
    fn many_series_look_different() {
        let series = (0..84).map(|i| (i.to_string(), vec![point(3.0, f64::from(i) + 1.0)]));
        let svg =
            curves(&Curves { title: "t", x_label: "bits", series: series.collect(), level: None });
        let lines: Vec<&str> = svg.lines().collect();
        // A line, behind which comes its mark: what differs are colours, dashes and shapes.
        let look = |pair: &[&str]| {
            let (_, stroke) = pair[0].split_once(" fill=\"none\"")?;
            let shape: String =
                pair[1].chars().filter(char::is_ascii_alphabetic).take(14).collect();
            Some((stroke.to_owned(), shape))
        };
        let looks: Vec<_> = lines.windows(2).filter_map(look).collect();
        let unique: std::collections::BTreeSet<_> = looks.iter().collect();
        assert_eq!((looks.len(), unique.len()), (84, 84));
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in
            [(20.0, "20"), (2.2e6, "2.2e6"), (0.05, "0.05"), (17.85, "17.9"), (3.25, "3.25")]
        {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn points_lie_in_the_chart_and_wrong_ones_are_left_out() {
        let svg = drawn(vec![point(4.4, 19.0), point(3.4, 29.0), point(2.4, f64::NAN)]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a&lt;b") && svg.contains("original 17.8"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        // In order of x: the path goes to the right.
        let path = svg.split("fill=\"none\"").next().unwrap().rsplit("d=\"M").next().unwrap();
        let xs: Vec<f64> =
            path.split(['L', '"']).filter_map(|p| p.split(' ').next()?.parse().ok()).collect();
        assert!(xs.len() == 2 && xs[0] < xs[1], "{xs:?}");
        assert!(drawn(vec![point(4.0, 19.0)]).contains("<circle"));
        assert!(drawn(vec![]).contains("no values"));
    }

    #[test]
    fn pictures_follow_the_screen() {
        assert!(drawn(vec![point(4.0, 19.0)]).contains("prefers-color-scheme:dark"));
    }
}
