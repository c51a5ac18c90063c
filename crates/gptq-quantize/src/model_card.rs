//! The README.md of a quantized checkpoint: what the hub reads (YAML front matter) and what people
//! do.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::Value;

use crate::calibration::SELF;
use crate::report::QuantReport;

/// What the model is for, by which the hub files it and transformers opens it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Task {
    /// Decoders write text.
    #[default]
    TextGeneration,
    /// Encoders with their head fill gaps in it.
    FillMask,
    /// Encoders without one turn it into vectors.
    FeatureExtraction,
}

impl Task {
    /// Of a model whose config.json names this class.
    pub fn new(causal: bool, architecture: &str) -> Self {
        match (causal, architecture.ends_with("ForMaskedLM")) {
            (true, _) => Self::TextGeneration,
            (false, true) => Self::FillMask,
            (false, false) => Self::FeatureExtraction,
        }
    }

    fn pipeline_tag(self) -> &'static str {
        match self {
            Self::TextGeneration => "text-generation",
            Self::FillMask => "fill-mask",
            Self::FeatureExtraction => "feature-extraction",
        }
    }

    /// The class of transformers.
    fn class(self) -> &'static str {
        match self {
            Self::TextGeneration => "AutoModelForCausalLM",
            Self::FillMask => "AutoModelForMaskedLM",
            Self::FeatureExtraction => "AutoModel",
        }
    }

    fn command(self) -> &'static str {
        match self {
            Self::TextGeneration => "generate this-repository-or-directory --chat \"Hello\"",
            Self::FillMask | Self::FeatureExtraction => {
                "embed this-repository-or-directory --text \"Hello\""
            }
        }
    }
}

/// What the card says beyond the run's report.
#[derive(Debug, Clone, Default)]
pub struct CardDetails<'a> {
    /// Heading of the card, for example the name of the output directory.
    pub name: &'a str,
    /// Hub id of the model that was quantized; `None` where it is not known, since a local path
    /// means nothing to others.
    pub base_model: Option<&'a str>,
    /// The base model's licence as its own card spells it (see [`license_of_card`]).
    pub license: Option<&'a str>,
    /// What the model is for.
    pub task: Task,
    /// Measured quality; the table is left out where this is empty.
    pub results: &'a [CardResult],
}

/// A row of the table of results.
#[derive(Debug, Clone, PartialEq)]
pub struct CardResult {
    /// What was measured on what, for example `perplexity, wikitext2-test (gptq protocol, 2048)`.
    pub metric: String,
    /// The original model's value; `None` where the metric compares with it.
    pub original: Option<f64>,
    /// The quantized model's value.
    pub quantized: f64,
    /// The command that measured it.
    pub command: String,
}

/// The card as Markdown.
pub fn model_card(report: &QuantReport, details: &CardDetails<'_>) -> String {
    let meta = report.quantize_config.get("meta");
    let config =
        |key: &str| report.quantize_config.get(key).or_else(|| meta.and_then(|meta| meta.get(key)));
    let widths: BTreeSet<u32> = report.modules.iter().map(|module| module.bits).collect();
    let widths: Vec<String> = widths.iter().map(u32::to_string).collect();
    let mut card = front_matter(&widths, details);
    let mut line = |text: &str| {
        card.push_str(text);
        card.push('\n');
    };
    let base = details.base_model.map_or_else(
        || "a local model".to_owned(),
        |id| format!("[{id}](https://huggingface.co/{id})"),
    );
    line(&format!("# {}\n", details.name));
    line(&format!(
        "{base}, quantized to {} bits with {} by gptq-rs {} ({:.2} bits per weight with scales and zeros, {} linears).\n",
        widths.join(", "),
        report.method.to_uppercase(),
        report.gptq_version,
        report.bits_per_weight,
        report.totals.modules
    ));

    line("## Settings\n\n| setting | value |\n|---|---|");
    for key in SETTINGS {
        if let Some(value) = config(key) {
            line(&format!("| {key} | {value} |"));
        }
    }
    if let Some(calibration) = &report.calibration {
        let names: Vec<String> = calibration
            .sources
            .iter()
            .map(|source| {
                let name = if source.kind == SELF { SELF_TEXT } else { &cell(&source.name) };
                // Of one source the windows are those of the whole.
                let mixed = calibration.sources.len() > 1;
                let share = if mixed { format!(" ({})", source.windows) } else { String::new() };
                format!("{name}{share}")
            })
            .collect();
        line(&format!(
            "| calibration | {}: {} windows of {} tokens, seed {} (fingerprint `{}`) |",
            names.join(", "),
            calibration.windows,
            calibration.seqlen,
            calibration.seed,
            calibration.fingerprint
        ));
        if let Some(note) = &calibration.note {
            line(&format!("| note | {} |", cell(note)));
        }
    }

    if !details.results.is_empty() {
        line(
            "\n## Results\n\n| metric | original | quantized | measured by |\n|---|---:|---:|---|",
        );
        for CardResult { metric, original, quantized, command } in details.results {
            let original = original.map_or_else(|| "–".to_owned(), number);
            line(&format!(
                "| {} | {original} | {} | `{}` |",
                cell(metric),
                number(*quantized),
                cell(command)
            ));
        }
    }
    line(&usage(details.task));
    card
}

/// The `license` of a base model's own card: the value in its YAML front matter, if there is one.
pub fn license_of_card(card: &str) -> Option<String> {
    let rest = card.strip_prefix('\u{feff}').unwrap_or(card).strip_prefix("---")?;
    let mut lines = rest.lines().skip(1).take_while(|line| line.trim_end() != "---");
    let value =
        lines.find_map(|line| line.strip_prefix("license:"))?.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

fn front_matter(widths: &[String], details: &CardDetails<'_>) -> String {
    let mut text = String::from("---\n");
    let mut entry = |key: &str, value: &str| {
        // Writing to a string cannot fail. A JSON string is a YAML string.
        let _ = writeln!(text, "{key}: {}", Value::from(value));
    };
    if let Some(base) = details.base_model {
        entry("base_model", base);
        entry("base_model_relation", "quantized");
    }
    if let Some(license) = details.license {
        entry("license", license);
    }
    entry("library_name", "transformers");
    entry("pipeline_tag", details.task.pipeline_tag());
    text.push_str("tags:\n- gptq\n");
    for bits in widths {
        let _ = writeln!(text, "- {bits}-bit");
    }
    text.push_str("---\n\n");
    text
}

/// Text inside a table cell: one line, no column borders.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

fn number(value: impl std::borrow::Borrow<f64>) -> String {
    let value = *value.borrow();
    if value != 0.0 && value.abs() < 0.1 { format!("{value:.2e}") } else { format!("{value:.3}") }
}

/// The keys of quantize_config.json and of its `meta` that the table shows, in its order.
const SETTINGS: [&str; 19] = [
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "act_group_aware",
    "static_groups",
    "true_sequential",
    "damp_percent",
    "damp_percent_auto",
    "order",
    "scale_search",
    "signed_scales",
    "awq_scales",
    "refine",
    "tune_blocks",
    "token_weights",
    "correction",
    "correction_strength",
    "checkpoint_format",
];

const SELF_TEXT: &str = "text sampled from the model itself";

fn usage(task: Task) -> String {
    let (class, command) = (task.class(), task.command());
    format!(
        r#"
## Use

```python
# transformers (needs optimum and gptqmodel)
from transformers import {class}, AutoTokenizer

path = "this-repository-or-directory"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {class}.from_pretrained(path, device_map="auto")
```

```sh
gptq {command}
gptq verify this-repository-or-directory   # which of vLLM, TGI, transformers, ExLlamaV2 and GPTQModel open it
```"#
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::calibration::{CalibrationOptions, CalibrationReport, SourceReport};
    use crate::report::tests::report;

    #[test]
    fn a_card_has_front_matter_settings_and_results() {
        let mut run = report();
        run.quantize_config = json!({ "bits": 4, "group_size": 64, "sym": true, "desc_act": false,
                "meta": { "token_weights": "balanced" } });
        let source = SourceReport {
            name: "wiki|text.txt".into(),
            kind: "text".into(),
            documents: 1,
            characters: 10,
            tokens: 8,
            windows: 2,
            coverage: 1.0,
            ..SourceReport::default()
        };
        let options = CalibrationOptions { nsamples: 2, seqlen: 8, seed: 3 };
        run.calibration =
            Some(CalibrationReport::new(vec![source], &[vec![1; 8], vec![2; 8]], &options, 100));
        let results = [CardResult {
            metric: "perplexity, test".into(),
            original: Some(17.834),
            quantized: 19.5,
            command: "gptq eval . --perplexity test.txt".into(),
        }];
        let details = CardDetails {
            name: "Smol-4bit",
            base_model: Some("org/Smol"),
            license: Some("apache-2.0"),
            results: &results,
            task: Task::TextGeneration,
        };
        let card = model_card(&run, &details);
        let front = "---\nbase_model: \"org/Smol\"\nbase_model_relation: \"quantized\"\nlicense: \"apache-2.0\"\n\
                     library_name: \"transformers\"\npipeline_tag: \"text-generation\"\ntags:\n- gptq\n- 4-bit\n---\n";
        assert!(card.starts_with(front), "{card}");
        for part in [
            "# Smol-4bit\n",
            "| group_size | 64 |",
            "| token_weights | \"balanced\" |",
            "wiki\\|text.txt: 2 windows of 8 tokens, seed 3",
            "| note | wiki\\|text.txt holds 8 tokens",
            "| perplexity, test | 17.834 | 19.500 | `gptq eval . --perplexity test.txt` |",
            "quantized to 4 bits",
            "AutoModelForCausalLM.from",
            "gptq generate",
        ] {
            assert!(card.contains(part), "{part} is not in\n{card}");
        }
    }

    #[test]
    fn unknown_details_leave_no_empty_lines_in_the_front_matter() {
        let card = model_card(&report(), &CardDetails { name: "x", ..CardDetails::default() });
        assert!(card.starts_with("---\nlibrary_name: \"transformers\"\n"), "{card}");
        assert!(!card.contains("## Results"));
    }

    #[test]
    fn encoders_and_mixed_bits_are_told_as_what_they_are() {
        let mut run = report();
        let mut other = run.modules[0].clone();
        other.bits = 3;
        run.modules.push(other);
        let task = Task::new(false, "BertModel");
        let card = model_card(&run, &CardDetails { name: "x", task, ..CardDetails::default() });
        for part in [
            "pipeline_tag: \"feature-extraction\"\ntags:\n- gptq\n- 3-bit\n- 4-bit\n---",
            "quantized to 3, 4 bits",
            "import AutoModel, AutoTokenizer",
            "gptq embed",
        ] {
            assert!(card.contains(part), "{part} is not in\n{card}");
        }
        assert_eq!(Task::new(false, "BertForMaskedLM").class(), "AutoModelForMaskedLM");
        assert_eq!(Task::new(true, ""), Task::TextGeneration);
    }

    #[test]
    fn the_licence_is_found_in_front_matter_only() {
        assert_eq!(
            license_of_card("---\nlanguage: en\nlicense: \"mit\"\n---\n# x").as_deref(),
            Some("mit")
        );
        assert_eq!(license_of_card("---\nlanguage: en\n---\nlicense: mit"), None);
        assert_eq!(license_of_card("# license: mit"), None);
        assert_eq!(license_of_card("---\nlicense:\n- mit\n---"), None);
        assert_eq!(license_of_card(""), None);
    }
}
