//! Tables and plots of a sweep.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use gptq_format::fs::write_atomic;
use serde_json::json;

use super::super::quantize;
use super::runner::{Planned, Results, RowResult};
use super::texts::{TextResult, name};
use crate::output::plot::{Curves, Point, curves, loss_by_run, text_map};
use crate::output::size;
use crate::output::table::{Align, Table, colour_allowed};

/// Writes `results.json`, `results.md` and plots/ into `directory`.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write(directory: &Path, results: &Results) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(&json!(results)).context("cannot write the results")?;
    write_atomic(&directory.join("results.json"), (text + "\n").as_bytes())?;
    write_atomic(&directory.join("results.md"), markdown(results).as_bytes())?;
    for (file, svg) in plots(results) {
        write_atomic(&directory.join("plots").join(file), svg.as_bytes())?;
    }
    Ok(())
}

/// The plots by file name.
fn plots(results: &Results) -> Vec<(String, String)> {
    let mut plots = Vec::new();
    for (index, original) in results.original.iter().enumerate() {
        let text = name(Path::new(&original.text));
        let number =
            if results.original.iter().filter(|o| name(Path::new(&o.text)) == text).count() > 1 {
                format!("-{}", index + 1)
            } else {
                String::new()
            };
        let perplexity = over_size(results, index, |result| Some(result.result.perplexity));
        let title = format!("Perplexity on {text}");
        let level = Some((original.result.perplexity, "original"));
        plots.push((format!("perplexity-{text}{number}.svg"), draw(&title, perplexity, level)));
        let kl = over_size(results, index, |result| Some(result.result.divergence?.kl_mean));
        let title = format!("Mean KL divergence from the original on {text}, nats per token");
        plots.push((format!("kl-{text}{number}.svg"), draw(&title, kl, None)));
    }
    let texts: Vec<String> =
        results.original.iter().map(|text| name(Path::new(&text.text))).collect();
    let kl = results.rows.iter().map(|row| {
        let of = |text: &TextResult| text.result.divergence.map_or(f64::NAN, |d| d.kl_mean);
        (row.name.as_str(), row.evaluations.iter().map(of).collect())
    });
    let title = "Mean KL divergence from the original, nats per token";
    plots.push(("kl.svg".to_owned(), text_map(title, &texts, &kl.collect::<Vec<_>>())));
    let runs: Vec<(&str, &[_])> =
        results.rows.iter().map(|row| (row.name.as_str(), row.modules.as_slice())).collect();
    plots.push(("loss.svg".to_owned(), loss_by_run(&runs)));
    for row in &results.rows {
        for (file, svg) in quantize::plots(&row.modules) {
            let kind = file.trim_end_matches(".svg");
            plots.push((format!("{kind}-{}.svg", row.name), svg));
        }
    }
    plots
}

fn draw(title: &str, series: Vec<(String, Vec<Point>)>, level: Option<(f64, &str)>) -> String {
    curves(&Curves { title, x_label: "bits per weight", series, level })
}

/// What rows have on text number `index` over their size, a curve for each series.
fn over_size(
    results: &Results,
    index: usize,
    value: impl Fn(&TextResult) -> Option<f64>,
) -> Vec<(String, Vec<Point>)> {
    let mut series: Vec<(String, Vec<Point>)> = Vec::new();
    for row in &results.rows {
        let Some(y) = row.evaluations.get(index).and_then(&value) else { continue };
        let point = Point { x: row.bits_per_weight, y, name: row.name.clone() };
        match series.iter_mut().find(|(name, _)| *name == row.series) {
            Some((_, points)) => points.push(point),
            None => series.push((row.series.clone(), vec![point])),
        }
    }
    series
}

/// The columns of the table, and its rows.
fn cells(results: &Results) -> (Vec<String>, Vec<Vec<String>>) {
    let mut columns: Vec<String> =
        ["row", "bits per weight", "size", "seconds"].map(str::to_owned).into();
    for original in &results.original {
        let text = name(Path::new(&original.text));
        columns.extend([text.clone(), format!("KL {text}"), format!("same top {text}")]);
    }
    let mut original = vec!["original".to_owned(), String::new()];
    original.extend([size::bytes(results.input_bytes), String::new()]);
    for text in &results.original {
        original.extend([format!("{:.3}", text.result.perplexity), String::new(), String::new()]);
    }
    let row = |row: &RowResult| {
        let mut cells = vec![
            row.name.clone(),
            format!("{:.3}", row.bits_per_weight),
            size::bytes(row.output_bytes),
            format!("{:.1}", row.seconds),
        ];
        for text in &row.evaluations {
            cells.push(format!("{:.3}", text.result.perplexity));
            let divergence = text.result.divergence;
            cells.push(divergence.map_or_else(String::new, |d| format!("{:.4}", d.kl_mean)));
            let top = divergence.map(|d| format!("{:.1} %", 100.0 * d.top1_agreement));
            cells.push(top.unwrap_or_default());
        }
        cells
    };
    (columns, [original].into_iter().chain(results.rows.iter().map(row)).collect())
}

/// The table as Markdown, with the commands that make each row again.
fn markdown(results: &Results) -> String {
    let (columns, rows) = cells(results);
    let cell = |text: &String| text.replace('|', "\\|");
    let line = |cells: &[String]| {
        format!("| {} |\n", cells.iter().map(cell).collect::<Vec<_>>().join(" | "))
    };
    let mut text = format!("# Sweep over {}\n\n", results.model);
    if let Some(first) = results.original.first() {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "Perplexity on each text ({} windows of {} tokens or fewer), mean KL divergence from the original in nats per \
             token, share of tokens with the same most likely next token.\n",
            first.result.windows, first.result.seqlen
        );
    }
    text += &line(&columns);
    let rules = (0..columns.len()).map(|index| if index == 0 { "---" } else { "---:" });
    text += &line(&rules.map(str::to_owned).collect::<Vec<_>>());
    for row in &rows {
        text += &line(row);
    }
    let mut machines: Vec<&str> = results.rows.iter().map(|row| row.machine.as_str()).collect();
    machines.sort_unstable();
    machines.dedup();
    if machines.len() > 1 {
        text += "\n## Machines\n\nProcessors round differently; seconds do not compare.\n\n";
        for machine in machines {
            let of = results.rows.iter().filter(|row| row.machine == machine);
            let names: Vec<&str> = of.map(|row| row.name.as_str()).collect();
            let _ = writeln!(text, "- {machine}: {}", names.join(", "));
        }
    }
    if !results.failed.is_empty() {
        text += "\n## Failed\n\n";
        for row in &results.failed {
            let _ = writeln!(text, "- {}: {} (`{}`)", row.name, row.error, row.command);
        }
    }
    text += "\n## Commands\n\n";
    for row in &results.rows {
        let _ = writeln!(text, "- {}: `{}`", row.name, row.command);
    }
    text
}

/// Prints the table.
///
/// # Errors
/// If stdout cannot be written to.
pub(super) fn print(results: &Results) -> anyhow::Result<()> {
    let (columns, rows) = cells(results);
    print_table(&columns, rows)
}

fn print_table(columns: &[String], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    let align = |index| if index == 0 { Align::Left } else { Align::Right };
    let columns = columns.iter().enumerate().map(|(index, name)| (name.as_str(), align(index)));
    let mut table = Table::of(columns);
    for row in rows {
        table.row(row);
    }
    crate::output::print(&table.render(colour_allowed(&std::io::stdout())))
}

/// Prints what rows would need.
///
/// # Errors
/// If stdout cannot be written to.
pub(super) fn print_plan(planned: &Planned) -> anyhow::Result<()> {
    let columns = ["row", "bits per weight", "size", "memory", "time", ""].map(str::to_owned);
    let rows = planned.rows.iter().map(|row| {
        vec![
            row.name.clone(),
            row.bits_per_weight.map_or_else(|| "measured".to_owned(), |bits| format!("{bits:.3}")),
            size::bytes(row.plan.output_bytes),
            size::bytes(row.plan.peak_rss_bytes),
            size::duration(Duration::from_secs_f64(row.plan.seconds)),
            if row.done { "done".to_owned() } else { String::new() },
        ]
    });
    print_table(&columns, rows.collect())
}
