//! `gptq embed`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use gptq_compute::Tensor;
use gptq_format::Tokenizer;
use gptq_model::pooling::normalize;
use gptq_model::{EncodeInput, HeadBits, Model, Pooling, SentencePooling, Session};
use serde::Serialize;

use super::{load, pool, progress, read_text};
use crate::Global;

/// Turn texts into vectors.
///
/// Pooling, normalisation, length and prompts come from the model's modules.json, 1_Pooling/config.json and
/// config_sentence_transformers.json where it has them; else the tokens' vectors are averaged. To a terminal the
/// start of each vector is printed with the similarity of each text to the first, elsewhere JSON lines.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory, .gguf file or hub id; float or GPTQ.
    model: String,
    /// A text; may be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present = "file")]
    text: Vec<String>,
    /// File with a text on each line, after those of --text; empty lines are left out.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Put before each text. [default: the model's default prompt, else nothing]
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_name")]
    prompt: Option<String>,
    /// Put the model's prompt of this name before each text, such as query.
    #[arg(long, value_name = "NAME")]
    prompt_name: Option<String>,
    /// How a text's tokens become one vector. [default: the model's, else mean]
    #[arg(long, value_enum)]
    pooling: Option<PoolingArg>,
    /// Scale vectors to length 1. [default: as the model says]
    #[arg(long)]
    normalize: bool,
    /// Cut texts to so many tokens, special ones included. [default: the model's]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Texts that are computed together; vectors depend on it by rounding alone.
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch_size: usize,
    /// One JSON object a line also to a terminal: {"index", "text", "tokens", "embedding"}.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PoolingArg {
    /// The mean over the tokens.
    Mean,
    /// The first token's vector.
    Cls,
    /// The largest value of each column.
    Max,
    /// The sum over the root of the number of tokens.
    MeanSqrtLen,
    /// The mean weighted by 1, 2, 3, …
    WeightedMean,
    /// The last token's vector.
    LastToken,
}

impl From<PoolingArg> for Pooling {
    fn from(arg: PoolingArg) -> Self {
        match arg {
            PoolingArg::Mean => Self::Mean,
            PoolingArg::Cls => Self::Cls,
            PoolingArg::Max => Self::Max,
            PoolingArg::MeanSqrtLen => Self::MeanSqrtLen,
            PoolingArg::WeightedMean => Self::WeightedMean,
            PoolingArg::LastToken => Self::LastToken,
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    ensure!(args.batch_size > 0, "--batch-size must be at least 1");
    let texts = texts(args)?;
    let view = progress(global);
    let pool = pool(global);
    let (checkpoint, model) = load(&args.model, HeadBits::Stored, &pool, &view)?;
    let tokenizer = checkpoint.tokenizer().context("texts cannot be tokenized")?;
    view.finish();
    if args.pooling.is_none() && !checkpoint.path.join("modules.json").exists() {
        tracing::warn!(
            "the model does not say how its tokens become one vector (modules.json): their mean; --pooling and --normalize \
             say otherwise"
        );
    }
    let how = settings(args, SentencePooling::from_dir(&checkpoint.path)?)?;
    let longest =
        args.max_tokens.or(how.max_tokens).unwrap_or(usize::MAX).min(model.spec().max_positions);
    let mut session = Session::new(pool);
    let mut printer = Printer::new(args.json);
    let mut vectors = Tensor::default();
    for (batch, texts) in texts.chunks(args.batch_size).enumerate() {
        let ids = texts
            .iter()
            .map(|text| tokenize(&tokenizer, text, &how, longest))
            .collect::<anyhow::Result<Vec<_>>>()?;
        encode(&model, &mut session, &ids, &how, &mut vectors)?;
        for (row, (text, ids)) in texts.iter().zip(&ids).enumerate() {
            let vector = vectors.row(row);
            ensure!(
                vector.iter().all(|x| x.is_finite()),
                "the vector of text {} is not finite: the model's weights are damaged",
                batch * args.batch_size + row
            );
            printer.print(batch * args.batch_size + row, text, ids.len(), vector)?;
        }
    }
    Ok(())
}

/// The texts of the command line and of the file, at least one.
fn texts(args: &Args) -> anyhow::Result<Vec<String>> {
    let mut texts = args.text.clone();
    if let Some(file) = &args.file {
        let content = read_text(file)?;
        let content = content.strip_prefix('\u{feff}').unwrap_or(&content);
        texts.extend(content.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
        ensure!(!texts.is_empty(), "{} holds no text", file.display());
    }
    Ok(texts)
}

/// The model's way, with what the command line says in its place.
fn settings(args: &Args, model: SentencePooling) -> anyhow::Result<SentencePooling> {
    let prompt = match (&args.prompt, &args.prompt_name) {
        (Some(text), _) => text.clone(),
        (None, Some(name)) => model.prompts.get(name).cloned().with_context(|| {
            format!("--prompt-name {name}: the model's prompts: {}", model.prompt_names())
        })?,
        (None, None) => model.prompt,
    };
    ensure!(
        prompt.is_empty() || model.include_prompt,
        "the model leaves the tokens of the prompt {prompt:?} out of its vectors (include_prompt), which is not \
         implemented; --prompt \"\" leaves out the prompt"
    );
    Ok(SentencePooling {
        modes: args.pooling.map_or(model.modes, |mode| vec![mode.into()]),
        normalize: model.normalize || args.normalize,
        prompt,
        ..model
    })
}

/// The tokens of a text behind its prompt, without white space around, as sentence-transformers has them.
fn tokenize(
    tokenizer: &Tokenizer,
    text: &str,
    how: &SentencePooling,
    longest: usize,
) -> anyhow::Result<Vec<u32>> {
    let whole = format!("{}{text}", how.prompt);
    let whole = whole.trim();
    let lower = if how.lower_case { whole.to_lowercase() } else { whole.to_owned() };
    let ids = tokenizer.encode_truncated(&lower, longest)?;
    ensure!(
        ids.len() <= longest,
        "--max-tokens {longest} is less than the special tokens around each text"
    );
    ensure!(!ids.is_empty(), "the text {text:?} has no tokens");
    Ok(ids)
}

/// The vectors of texts, which lie one after the other without padding: none sees another.
fn encode(
    model: &Model,
    session: &mut Session,
    ids: &[Vec<u32>],
    how: &SentencePooling,
    vectors: &mut Tensor,
) -> anyhow::Result<()> {
    let batch: Vec<EncodeInput<'_>> =
        ids.iter().map(|ids| EncodeInput { ids, ..EncodeInput::default() }).collect();
    how.pool(&model.encode(session, &batch)?, vectors);
    Ok(())
}

/// A text's line on stdout.
#[derive(Serialize)]
struct Line<'a> {
    index: usize,
    text: &'a str,
    /// Tokens that were computed, special ones included.
    tokens: usize,
    embedding: &'a [f32],
}

/// JSON lines, or for people the start of each vector and its similarity to the first text.
struct Printer {
    lines: bool,
    first: Option<Vec<f32>>,
}

impl Printer {
    fn new(json: bool) -> Self {
        Self { lines: json || !std::io::stdout().is_terminal(), first: None }
    }

    fn print(
        &mut self,
        index: usize,
        text: &str,
        tokens: usize,
        vector: &[f32],
    ) -> anyhow::Result<()> {
        let line = if self.lines {
            serde_json::to_string(&Line { index, text, tokens, embedding: vector })?
        } else {
            self.human(text, vector)
        };
        writeln!(std::io::stdout().lock(), "{line}").context("cannot write to stdout")
    }

    fn human(&mut self, text: &str, vector: &[f32]) -> String {
        const SHOWN: usize = 4;
        const LONGEST: usize = 48;
        let start: Vec<String> = vector.iter().take(SHOWN).map(|x| format!("{x:+.4}")).collect();
        let mut unit = vector.to_vec();
        normalize(&mut unit);
        let first = self.first.get_or_insert_with(|| unit.clone());
        let similarity: f32 = first.iter().zip(&unit).map(|(a, b)| a * b).sum();
        let mut shown: String = text.chars().take(LONGEST).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        format!("{similarity:+.4}  [{} …; {}]  {shown}", start.join(" "), vector.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_the_similarity_to_the_first_text() {
        let mut printer = Printer { lines: false, first: None };
        assert_eq!(printer.human("one", &[3.0, 4.0]), "+1.0000  [+3.0000 +4.0000 …; 2]  one");
        let long = "ä".repeat(60);
        let line = printer.human(&long, &[-4.0, 3.0, 0.0, 0.0, 9.0][..2]);
        assert!(line.starts_with("+0.0000") && line.ends_with("ä…"), "{line}");
    }
}
