//! Aligned text tables.

use std::io::IsTerminal;

/// Where the cells of a column stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Names.
    Left,
    /// Numbers.
    Right,
}

/// A table that is filled row by row and rendered at once.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column headings.
    pub(crate) fn new<const N: usize>(columns: [(&str, Align); N]) -> Self {
        Self::of(columns)
    }

    /// As [`Table::new`] for any number of columns.
    pub(crate) fn of<'c>(columns: impl IntoIterator<Item = (&'c str, Align)>) -> Self {
        let columns = columns.into_iter().map(|(heading, align)| (heading.to_owned(), align));
        Self { columns: columns.collect(), rows: Vec::new() }
    }

    /// Adds a row; cells beyond the headings are dropped, missing ones stay empty.
    pub(crate) fn row<C: Into<String>>(&mut self, cells: impl IntoIterator<Item = C>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The table as lines, each ended by a line feed; headings are dim where `colour` is set.
    pub(crate) fn render(&self, colour: bool) -> String {
        let empty = String::new();
        let cell = |row: &Vec<String>, index: usize| row.get(index).unwrap_or(&empty).clone();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|index| {
                let cells = self.rows.iter().map(|row| cell(row, index).chars().count());
                cells.chain([self.columns[index].0.chars().count()]).max().unwrap_or(0)
            })
            .collect();
        let line = |texts: Vec<String>| {
            let padded =
                texts.iter().zip(&self.columns).zip(&widths).map(|((text, (_, align)), width)| {
                    match align {
                        Align::Left => format!("{text:<width$}"),
                        Align::Right => format!("{text:>width$}"),
                    }
                });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let heading = line(self.columns.iter().map(|(heading, _)| heading.clone()).collect());
        let mut text =
            if colour { format!("\x1b[2m{heading}\x1b[0m\n") } else { format!("{heading}\n") };
        for row in &self.rows {
            text.push_str(&line((0..self.columns.len()).map(|index| cell(row, index)).collect()));
            text.push('\n');
        }
        text
    }
}

/// Whether escape codes may go to `stream`: it is a terminal, `NO_COLOR` is not set and `TERM` is
/// not `dumb`.
pub(crate) fn colour_allowed(stream: &impl IsTerminal) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    stream.is_terminal() && !refused && !dumb
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Table {
        let mut table =
            Table::new([("module", Align::Left), ("loss", Align::Right), ("note", Align::Left)]);
        table.row(["q_proj", "0.5", ""]);
        table.row(["größe", "12.25", "ok"]);
        table.row(["short"]);
        table
    }

    #[test]
    fn numbers_stand_to_the_right() {
        assert_eq!(
            example().render(false),
            "module   loss  note\nq_proj    0.5\ngröße   12.25  ok\nshort\n"
        );
    }

    #[test]
    fn colour_touches_the_heading_only() {
        let text = example().render(true);
        assert!(text.starts_with("\x1b[2mmodule   loss  note\x1b[0m\nq_proj"));
        assert_eq!(text.matches('\x1b').count(), 2);
    }
}
