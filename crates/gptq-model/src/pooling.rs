//! From the tokens' hidden states to one vector per text, as sentence-transformers describes it beside a checkpoint:
//! `modules.json` lists the steps, `1_Pooling/config.json` says how tokens are pooled.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Component, Path};

use gptq_compute::Tensor;
use gptq_format::FormatError;
use serde_json::{Map, Value};

use crate::encode::Encoded;
use crate::fields::Fields;
use crate::{ModelError, Result};

/// One way to make a vector of a sequence's hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's.
    Cls,
    /// The largest value of each column.
    Max,
    /// The mean.
    Mean,
    /// The sum over the root of the number of tokens.
    MeanSqrtLen,
    /// The mean weighted by 1, 2, 3, … in the order of the tokens.
    WeightedMean,
    /// The last token's.
    LastToken,
}

/// How a checkpoint's texts become vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentencePooling {
    /// The poolings, whose vectors are concatenated.
    pub modes: Vec<Pooling>,
    /// Vectors are scaled to length 1.
    pub normalize: bool,
    /// Longer texts are cut to so many tokens, special tokens included.
    pub max_tokens: Option<usize>,
    /// Texts are put into lower case.
    pub lower_case: bool,
    /// What stands before each text unless another prompt is asked for: that of `default_prompt_name`.
    pub prompt: String,
    /// Texts by the names of what they are put before (`query`, `document`).
    pub prompts: BTreeMap<String, String>,
    /// A prompt's tokens are pooled, too.
    pub include_prompt: bool,
}

impl Default for SentencePooling {
    /// The mean, not normalised: what sentence-transformers does with a bare encoder.
    fn default() -> Self {
        Self {
            modes: vec![Pooling::Mean],
            normalize: false,
            max_tokens: None,
            lower_case: false,
            prompt: String::new(),
            prompts: BTreeMap::new(),
            include_prompt: true,
        }
    }
}

/// Where the settings of the transformer may be; the first that exists counts.
const TRANSFORMER_CONFIGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// Keys of a pooling config, in the order in which sentence-transformers concatenates, and the newer single value.
const MODES: [(&str, &str, Pooling); 6] = [
    ("pooling_mode_cls_token", "cls", Pooling::Cls),
    ("pooling_mode_max_tokens", "max", Pooling::Max),
    ("pooling_mode_mean_tokens", "mean", Pooling::Mean),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", Pooling::MeanSqrtLen),
    ("pooling_mode_weightedmean_tokens", "weightedmean", Pooling::WeightedMean),
    ("pooling_mode_lasttoken", "lasttoken", Pooling::LastToken),
];

impl SentencePooling {
    /// Reads `modules.json` of a checkpoint directory, the files that it names and those of settings; the default where
    /// there are none.
    ///
    /// # Errors
    /// A file that cannot be read or is not what it should be, or a step that is not implemented (`Dense`, for example).
    pub fn from_dir(directory: &Path) -> Result<Self> {
        let mut found = Self::default();
        found.read_modules(directory)?;
        let settings = |name: &str| -> Result<_> {
            let file = directory.join(name);
            Ok(read(&file)?.and_then(|value| Some((file, value.as_object()?.clone()))))
        };
        for name in TRANSFORMER_CONFIGS {
            if let Some((file, map)) = settings(name)? {
                let fields = Fields::new(&file, &map);
                found.max_tokens = fields.opt_count("max_seq_length")?;
                found.lower_case = fields.flag_or("do_lower_case", false)?;
                break;
            }
        }
        if found.max_tokens.is_none()
            && let Some((_, map)) = settings("tokenizer_config.json")?
        {
            // Where there is no limit it is 1e30, which is no u64.
            let limit = map.get("model_max_length").and_then(Value::as_u64);
            found.max_tokens = limit.and_then(|limit| usize::try_from(limit).ok());
        }
        if let Some((file, map)) = settings("config_sentence_transformers.json")? {
            found.read_prompts(&Fields::new(&file, &map))?;
        }
        Ok(found)
    }

    /// The steps of `modules.json`.
    fn read_modules(&mut self, directory: &Path) -> Result<()> {
        let file = directory.join("modules.json");
        let Some(modules) = read(&file)? else { return Ok(()) };
        let bad = |value: &Value, expected: &str| ModelError::BadField {
            file: file.clone(),
            key: "modules".to_owned(),
            value: value.to_string(),
            expected: expected.to_owned(),
        };
        for module in modules.as_array().into_iter().flatten() {
            let text = |key| module.get(key).and_then(Value::as_str).unwrap_or("");
            let inside = Path::new(text("path"));
            if !inside.components().all(|part| matches!(part, Component::Normal(_))) {
                return Err(bad(module, "a path inside the directory"));
            }
            match text("type").rsplit('.').next() {
                Some("Transformer" | "Dropout") => {}
                Some("Pooling") => self.read_pooling(&directory.join(inside))?,
                Some("Normalize") => self.normalize = true,
                _ => return Err(bad(module, "Transformer, Pooling or Normalize")),
            }
        }
        Ok(())
    }

    /// The poolings of one pooling directory.
    fn read_pooling(&mut self, directory: &Path) -> Result<()> {
        let file = directory.join("config.json");
        let empty = Map::new();
        let value = read(&file)?;
        let map = value.as_ref().and_then(Value::as_object).unwrap_or(&empty);
        let fields = Fields::new(&file, map);
        let named = fields.opt_text("pooling_mode")?;
        self.modes.clear();
        for (key, name, mode) in MODES {
            if fields.flag_or(key, false)? || named == Some(name) {
                self.modes.push(mode);
            }
        }
        if self.modes.is_empty() {
            return Err(fields.missing("pooling_mode_mean_tokens"));
        }
        self.include_prompt = fields.flag_or("include_prompt", true)?;
        Ok(())
    }

    /// The texts that can stand before others, and the one that does.
    fn read_prompts(&mut self, fields: &Fields<'_>) -> Result<()> {
        if let Some(prompts) = fields.opt_object("prompts")? {
            for name in prompts.keys() {
                let prompt = prompts.opt_text(name)?.unwrap_or_default();
                self.prompts.insert(name.to_owned(), prompt.to_owned());
            }
        }
        if let Some(name) = fields.opt_text("default_prompt_name")? {
            let Some(prompt) = self.prompts.get(name) else {
                let names = format!("one of the prompts ({})", self.prompt_names());
                return Err(fields.bad("default_prompt_name", names));
            };
            self.prompt.clone_from(prompt);
        }
        Ok(())
    }

    /// The names of the prompts, for messages.
    pub fn prompt_names(&self) -> String {
        if self.prompts.is_empty() {
            return "there are none".to_owned();
        }
        self.prompts.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    /// The vectors `[sequences, hidden * modes]` of encoded sequences.
    pub fn pool(&self, encoded: &Encoded<'_>, out: &mut Tensor) {
        let width = encoded.hidden.cols();
        out.resize(encoded.rows.len(), width * self.modes.len());
        for (index, rows) in encoded.rows.iter().enumerate() {
            let tokens = || rows.clone().map(|row| encoded.hidden.row(row));
            for (mode, out) in self.modes.iter().zip(out.row_mut(index).chunks_exact_mut(width)) {
                mode.apply(tokens(), rows.len(), out);
            }
        }
        if self.normalize {
            (0..out.rows()).for_each(|row| normalize(out.row_mut(row)));
        }
    }
}

impl Pooling {
    /// Pools `count` tokens, at least one, into `out`.
    fn apply<'a>(
        self,
        mut tokens: impl DoubleEndedIterator<Item = &'a [f32]>,
        count: usize,
        out: &mut [f32],
    ) {
        let mut sum = |out: &mut [f32], weights: fn(usize) -> f32| {
            out.fill(0.0);
            for (index, token) in tokens.by_ref().enumerate() {
                let weight = weights(index);
                out.iter_mut().zip(token).for_each(|(out, x)| *out += weight * x);
            }
        };
        let divisor = match self {
            Self::Cls | Self::LastToken => {
                let token = if self == Self::Cls { tokens.next() } else { tokens.next_back() };
                out.copy_from_slice(token.unwrap_or(&[]));
                return;
            }
            Self::Max => {
                out.fill(f32::NEG_INFINITY);
                tokens.for_each(|token| {
                    out.iter_mut().zip(token).for_each(|(out, &x)| *out = out.max(x));
                });
                return;
            }
            Self::Mean => {
                sum(out, |_| 1.0);
                count as f32
            }
            Self::MeanSqrtLen => {
                sum(out, |_| 1.0);
                (count as f32).sqrt()
            }
            Self::WeightedMean => {
                sum(out, |index| (index + 1) as f32);
                (count * (count + 1) / 2) as f32
            }
        };
        for x in out {
            *x /= divisor;
        }
    }
}

/// Scales a vector to length 1; one of zeros stays.
pub fn normalize(vector: &mut [f32]) {
    const SMALLEST: f64 = 1e-12;
    let squares: f64 = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let length = squares.sqrt().max(SMALLEST) as f32;
    for x in vector {
        *x /= length;
    }
}

/// A JSON file, if it exists; beside a GGUF file, whose path is no directory, there is none.
fn read(file: &Path) -> Result<Option<Value>> {
    let missing = [ErrorKind::NotFound, ErrorKind::NotADirectory];
    let text = match std::fs::read_to_string(file) {
        Err(error) if missing.contains(&error.kind()) => return Ok(None),
        text => text.map_err(FormatError::io("read", file))?,
    };
    serde_json::from_str(&text).map(Some).map_err(|error| ModelError::BadField {
        file: file.to_owned(),
        key: String::new(),
        value: error.to_string(),
        expected: "JSON".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled(modes: &[Pooling], normalize: bool) -> Vec<f32> {
        let hidden = Tensor::from_vec(4, 2, vec![9.0, 9.0, 3.0, -4.0, 0.0, 2.0, 6.0, -1.0]);
        let rows = [0..1, 1..4];
        let encoded = Encoded { hidden: &hidden, rows: &rows, pooled: None };
        let how = SentencePooling { modes: modes.to_vec(), normalize, ..Default::default() };
        let mut out = Tensor::default();
        how.pool(&encoded, &mut out);
        out.row(1).to_vec()
    }

    #[test]
    fn every_pooling_by_hand() {
        let root = 3f32.sqrt();
        for (mode, want) in [
            (Pooling::Cls, [3.0, -4.0]),
            (Pooling::Max, [6.0, 2.0]),
            (Pooling::Mean, [3.0, -1.0]),
            (Pooling::MeanSqrtLen, [9.0 / root, -3.0 / root]),
            (Pooling::WeightedMean, [3.5, -0.5]),
            (Pooling::LastToken, [6.0, -1.0]),
        ] {
            assert_eq!(pooled(&[mode], false), want, "{mode:?}");
        }
        assert_eq!(pooled(&[Pooling::Cls], true), [0.6, -0.8]);
        assert_eq!(pooled(&[Pooling::Max, Pooling::Mean], false), [6.0, 2.0, 3.0, -1.0]);
    }

    #[test]
    fn modules_are_read_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let read = || SentencePooling::from_dir(folder.path());
        assert_eq!(read().unwrap(), SentencePooling::default());
        write(
            "modules.json",
            r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#,
        );
        assert!(read().unwrap_err().to_string().contains("pooling_mode"));
        write(
            "1_Pooling/config.json",
            r#"{"word_embedding_dimension": 8, "pooling_mode_cls_token": true}"#,
        );
        write("sentence_bert_config.json", r#"{"max_seq_length": 256, "do_lower_case": false}"#);
        let want = SentencePooling {
            modes: vec![Pooling::Cls],
            normalize: true,
            max_tokens: Some(256),
            ..Default::default()
        };
        assert_eq!(read().unwrap(), want);
        write("1_Pooling/config.json", r#"{"pooling_mode": "mean"}"#);
        assert_eq!(read().unwrap().modes, [Pooling::Mean]);
        write("modules.json", r#"[{"path": "../x", "type": "a.Pooling"}]"#);
        assert!(read().unwrap_err().to_string().contains("../x"));
        write("modules.json", r#"[{"path": "2_Dense", "type": "a.Dense"}]"#);
        assert!(read().unwrap_err().to_string().contains("2_Dense"));
    }

    #[test]
    fn lengths_and_prompts_come_from_the_files_beside() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let read = || SentencePooling::from_dir(folder.path());
        write("tokenizer_config.json", r#"{"model_max_length": 1000000000000000019884624838656}"#);
        assert_eq!(read().unwrap().max_tokens, None);
        write("tokenizer_config.json", r#"{"model_max_length": 512}"#);
        assert_eq!(read().unwrap().max_tokens, Some(512));
        write("sentence_xlm-roberta_config.json", r#"{"max_seq_length": 64}"#);
        assert_eq!(read().unwrap().max_tokens, Some(64));
        let roberta = r#"{"max_seq_length": 128, "do_lower_case": true}"#;
        write("sentence_roberta_config.json", roberta);
        let found = read().unwrap();
        assert_eq!((found.max_tokens, found.lower_case), (Some(128), true));

        let prompts = |default: &str| {
            let text = format!(
                r#"{{"prompts": {{"query": "Q: ", "document": "D: "}}, "default_prompt_name": {default}}}"#
            );
            write("config_sentence_transformers.json", &text);
            read()
        };
        let found = prompts("null").unwrap();
        assert_eq!((found.prompt.as_str(), found.prompts["query"].as_str()), ("", "Q: "));
        assert_eq!(prompts("\"document\"").unwrap().prompt, "D: ");
        let error = prompts("\"passage\"").unwrap_err().to_string();
        assert!(error.contains("passage") && error.contains("document, query"), "{error}");
    }
}
