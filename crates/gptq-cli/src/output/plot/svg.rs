//! SVG drawn by hand: a frame that is light or dark as the reader's screen, text, axes.

use std::fmt::Write;

/// A picture as it grows.
pub(super) struct Svg {
    body: String,
}

impl Svg {
    /// An empty picture with a title.
    pub(super) fn new(title: &str, width: f64, height: f64) -> Self {
        let title = escape(title);
        let body = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\">\n{STYLE}\
             <rect class=\"paper\" width=\"{width}\" height=\"{height}\"/>\n\
             <text x=\"16\" y=\"24\" font-size=\"15\" font-weight=\"600\">{title}</text>\n"
        );
        Self { body }
    }

    /// Adds elements as they are.
    pub(super) fn push(&mut self, element: &str) {
        self.body.push_str(element);
    }

    /// Adds text; `anchor` is `start`, `middle` or `end`.
    pub(super) fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        self.push(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>\n"
        ));
    }

    /// Adds a line through `points`, a dot on each with its text on pointing, and an entry of the
    /// legend. `None` leaves a gap.
    pub(super) fn series(
        &mut self,
        index: usize,
        name: &str,
        points: &[Option<(f64, f64, String)>],
    ) {
        let colour = LINE_COLOURS[index % LINE_COLOURS.len()];
        // Beyond the colours, dashes tell the lines apart, and beyond these marks.
        let round = index / LINE_COLOURS.len();
        let dash = DASHES[round % DASHES.len()];
        let shape = Shape::ALL[round / DASHES.len() % Shape::ALL.len()];
        let (mut path, mut pen) = (String::new(), 'M');
        let mut dots = String::new();
        for point in points {
            let Some((x, y, label)) = point else {
                pen = 'M';
                continue;
            };
            // Writing to a string cannot fail.
            let _ = write!(path, "{pen}{x:.1} {y:.1}");
            let label = escape(label);
            dots.push_str(&shape.at(*x, *y, colour, &label));
            pen = 'L';
        }
        self.push(&format!("<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"{dash}/>\n{dots}"));
        let (left, row) = (LEFT + CHART_WIDTH + 16.0, TOP + 10.0 + index as f64 * 18.0);
        self.push(&format!(
            "<path d=\"M{left} {row}h18\" stroke=\"{colour}\" stroke-width=\"2.4\"{dash}/>\n"
        ));
        if shape != Shape::Circle {
            self.push(&shape.at(left + 9.0, row, colour, ""));
        }
        self.text(left + 24.0, row + 4.0, "start", name);
    }

    /// A line of the grid across the chart, with its label.
    pub(super) fn level(&mut self, y: f64, label: &str) {
        self.push(&format!("<path class=\"grid\" d=\"M{LEFT} {y:.1}h{CHART_WIDTH}\"/>\n"));
        self.text(LEFT - 8.0, y + 4.0, "end", label);
    }

    /// What is left of a picture without values.
    pub(super) fn empty(mut self) -> String {
        self.text(LEFT, TOP + 20.0, "start", "no values");
        self.finish()
    }

    /// The picture.
    pub(super) fn finish(mut self) -> String {
        self.push("</svg>\n");
        self.body
    }
}

/// The mark of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Circle,
    Square,
    Triangle,
    Diamond,
}

impl Shape {
    const ALL: [Self; 4] = [Self::Circle, Self::Square, Self::Triangle, Self::Diamond];

    /// The mark, with an escaped text on pointing.
    fn at(self, x: f64, y: f64, colour: &str, label: &str) -> String {
        let (element, end) = match self {
            Self::Circle => (format!("circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.2\""), "circle"),
            Self::Square => (format!("path d=\"M{x:.1} {y:.1}m-3-3h6v6h-6z\""), "path"),
            Self::Triangle => (format!("path d=\"M{x:.1} {y:.1}m0-4l4 7h-8z\""), "path"),
            Self::Diamond => (format!("path d=\"M{x:.1} {y:.1}m0-4l4 4l-4 4l-4-4z\""), "path"),
        };
        format!("<{element} fill=\"{colour}\"><title>{label}</title></{end}>\n")
    }
}

/// Height of a chart whose legend has so many entries.
pub(super) fn chart_height(entries: usize) -> f64 {
    CHART_HEIGHT.max(20.0 + entries as f64 * 18.0)
}

/// Width of a legend with these entries.
pub(super) fn legend_width<'a>(entries: impl Iterator<Item = &'a str>) -> f64 {
    let longest = entries.map(|name| name.chars().count()).max().unwrap_or(0);
    LEGEND_WIDTH.max(48.0 + longest as f64 * CHARACTER)
}

/// Text as XML wants it. Control characters have no place in XML and become spaces.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Colours of paper, grid and text on light and on dark screens.
const STYLE: &str = "<style>.paper{fill:#fff}.grid{stroke:#e4e4e4}text{fill:#333}\
    @media(prefers-color-scheme:dark){.paper{fill:#161b22}.grid{stroke:#30363d}text{fill:#d0d7de}}</style>\n";

/// Okabe and Ito's colours, told apart by colour-blind readers too and seen on black and white;
/// yellow is left out, being too light for lines, and black is grey.
const LINE_COLOURS: [&str; 7] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c"];

const DASHES: [&str; 3] = ["", " stroke-dasharray=\"5 3\"", " stroke-dasharray=\"2 2\""];

pub(super) const LEFT: f64 = 64.0;
pub(super) const TOP: f64 = 44.0;
pub(super) const BOTTOM: f64 = 48.0;
pub(super) const CHART_WIDTH: f64 = 620.0;
const CHART_HEIGHT: f64 = 320.0;
/// Of a legend with short entries.
const LEGEND_WIDTH: f64 = 260.0;
/// Width of a character, about.
pub(super) const CHARACTER: f64 = 6.6;
