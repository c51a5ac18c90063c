//! `gptq verify`.

use std::fmt::Write;
use std::process::ExitCode;

use gptq_checkpoint::verify::Engine;
use gptq_checkpoint::{Finding, Report, Severity};
use serde_json::{Value, json};

use super::{progress, resolve};
use crate::Global;
use crate::output::json as json_output;
use crate::output::table::{Align, Table, colour_allowed};

/// Check a GPTQ checkpoint: is it sound, and which engines read from it what was meant?
///
/// The exit code is the result: 0 if no error was found (and every --engine opens the checkpoint),
/// 1 otherwise.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory or hub id.
    model: String,
    /// Fail if this engine does not open it; may be given several times.
    #[arg(long, value_enum, value_name = "NAME")]
    engine: Vec<EngineArg>,
    /// Name every module instead of the first of those with the same finding.
    #[arg(long)]
    all: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum EngineArg {
    Vllm,
    Tgi,
    Transformers,
    Exllama,
    Gptqmodel,
}

impl From<EngineArg> for Engine {
    fn from(engine: EngineArg) -> Self {
        match engine {
            EngineArg::Vllm => Self::Vllm,
            EngineArg::Tgi => Self::Tgi,
            EngineArg::Transformers => Self::Transformers,
            EngineArg::Exllama => Self::Exllama,
            EngineArg::Gptqmodel => Self::Gptqmodel,
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<ExitCode> {
    let view = progress(global);
    let path = resolve(&args.model, &view)?;
    view.finish();
    let report = gptq_checkpoint::verify(&path)?;
    let wanted: Vec<Engine> = args.engine.iter().map(|&engine| engine.into()).collect();
    let opens = |engine: &Engine| report.engines.iter().any(|v| v.engine == *engine && v.opens);
    let passed = report.is_sound() && wanted.iter().all(opens);
    if args.json {
        let mut out = json!({ "model": args.model, "passed": passed, "sound": report.is_sound() });
        if let (Value::Object(out), Value::Object(rest)) =
            (&mut out, serde_json::to_value(&report)?)
        {
            out.extend(rest);
        }
        json_output::print(&out)?;
    } else {
        crate::output::print(&text(&report, args.all))?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(report: &Report, all: bool) -> String {
    let colour = colour_allowed(&std::io::stdout());
    let paint = |code: &str, text: &str| {
        if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    };
    let mut out = String::new();
    for group in grouped(&report.findings) {
        let (severity, code) = match group[0].severity {
            Severity::Error => ("error", "1;31"),
            Severity::Warning => ("warning", "1;33"),
            Severity::Note => ("note", "1;36"),
        };
        let shown = if all { group.len() } else { 1 };
        for finding in &group[..shown] {
            let subject = finding.subject.as_deref().map(|s| format!("{s}: ")).unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{}: {subject}{}", paint(code, severity), finding.message);
        }
        if group.len() > shown {
            let _ = writeln!(out, "  and {} more like it (--all names them)", group.len() - shown);
        }
        if let Some(hint) = group[0].hint {
            let _ = writeln!(out, "  {} {hint}", paint("2", "hint:"));
        }
    }
    if !report.findings.is_empty() {
        out.push('\n');
    }
    let mut table =
        Table::new([("engine", Align::Left), ("opens it", Align::Left), ("", Align::Left)]);
    for verdict in &report.engines {
        let conditions = verdict.conditions.iter().map(|condition| format!("with {condition}"));
        let mut remarks = verdict.reasons.iter().cloned().chain(conditions);
        let answer = if verdict.opens { "yes" } else { "no" };
        let first = remarks.next().unwrap_or_default();
        table.row([verdict.engine.name().to_owned(), answer.to_owned(), first]);
        for remark in remarks {
            table.row([String::new(), String::new(), remark]);
        }
    }
    out.push_str(&table.render(colour));
    let count = |severity, one: &str| {
        let n = report.count(severity);
        format!("{n} {one}{}", if n == 1 { "" } else { "s" })
    };
    let _ = writeln!(
        out,
        "\n{}, {} quantized modules, {} tensors: {}, {}, {}",
        report.format.unwrap_or("not opened"),
        report.modules,
        report.tensors,
        count(Severity::Error, "error"),
        count(Severity::Warning, "warning"),
        count(Severity::Note, "note"),
    );
    out
}

/// Findings of the same kind together, in order of the first of each.
fn grouped(findings: &[Finding]) -> Vec<Vec<&Finding>> {
    let mut groups: Vec<Vec<&Finding>> = Vec::new();
    for finding in findings {
        let same = |group: &&mut Vec<&Finding>| {
            (group[0].severity, group[0].code, group[0].hint)
                == (finding.severity, finding.code, finding.hint)
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(finding),
            None => groups.push(vec![finding]),
        }
    }
    groups
}
