//! Calibration windows of `gptq quantize` and `gptq sweep`: files, the model's own text, or both.

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use gptq_compute::Pool;
use gptq_format::{Checkpoint, Tokenizer};
use gptq_model::{LoadOptions, Model, Session, Spec};
use gptq_quantize::calibration::{SELF, SourceReport, shares, split_weight};
use gptq_quantize::pipeline::Job;
use gptq_quantize::{
    CalibrationOptions, CalibrationReport, CalibrationSet, CalibrationSource, Plan, Progress,
    QuantizeOptions, SelfCalibration, Windows, plan, self_calibrate,
};

use super::explain;
use crate::output::progress::ProgressView;

/// Where windows come from and how many.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// `FILE`, `self`, or one of these with `@WEIGHT`.
    pub(crate) sources: Vec<String>,
    /// What a window is.
    pub(crate) kind: Windows,
    /// Windows, their length and the seed.
    pub(crate) windows: CalibrationOptions,
    /// Of the model's own text: sampling temperature.
    pub(crate) temperature: f32,
    /// Of the model's own text: so many most likely tokens.
    pub(crate) top_k: usize,
}

/// What is calibrated for.
pub(crate) struct Target<'a> {
    pub(crate) model: &'a str,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) pool: &'a Arc<Pool>,
    /// With these options: what cannot be done is refused before the model writes.
    pub(crate) options: &'a QuantizeOptions,
    /// The model does not write, its windows are blank: a plan depends on their number alone.
    pub(crate) dry_run: bool,
    /// Told what the run will need before the model writes.
    pub(crate) announce: &'a dyn Fn(&Plan, &Job<'_>),
}

/// Reads the files, and lets the model write what is asked of it. Windows of the model's own text
/// come behind those of the files.
pub(crate) fn load(
    request: &Request,
    target: &Target<'_>,
    view: &ProgressView,
) -> anyhow::Result<CalibrationSet> {
    let Request { kind, windows, .. } = *request;
    let vocab = Spec::for_checkpoint(target.checkpoint)?.vocab;
    let sources: Vec<(String, f64)> = request
        .sources
        .iter()
        .map(|text| {
            let (name, weight) = split_weight(text);
            (name.to_owned(), weight)
        })
        .collect();
    if sources.iter().filter(|(name, _)| name == SELF).count() > 1 {
        bail!("--calibration self is given twice; give it once, with a weight");
    }
    let shares = shares(&sources, windows.nsamples)?;
    let (mut files, mut of_files, mut own) = (Vec::new(), Vec::new(), None);
    for ((name, weight), &share) in sources.iter().zip(&shares) {
        if name == SELF {
            own = Some((share, *weight));
        } else {
            files.push(CalibrationSource::file(name)?.with_weight(*weight));
            of_files.push(share);
        }
    }
    let read = (!files.is_empty()).then(|| {
        view.phase("calibration");
        let windows = CalibrationOptions { nsamples: of_files.iter().sum(), ..windows };
        CalibrationSet::load_shares(&files, &of_files, target.tokenizer, vocab, kind, &windows)
    });
    let read = read.transpose()?;
    let Some((share, weight)) = own else {
        return match read {
            Some(set) => Ok(set),
            None => bail!("--calibration names no source"),
        };
    };
    let windows = CalibrationOptions { nsamples: share, ..windows };
    let mut written = written(request, windows, target, read.as_ref(), view)?;
    for source in &mut written.report.sources {
        source.weight = weight;
    }
    Ok(match read {
        Some(read) => read.followed_by(written, vocab),
        None => written,
    })
}

/// What the model writes; `read` is what comes before it.
fn written(
    request: &Request,
    windows: CalibrationOptions,
    target: &Target<'_>,
    read: Option<&CalibrationSet>,
    view: &ProgressView,
) -> anyhow::Result<CalibrationSet> {
    let Target { checkpoint, tokenizer, pool, .. } = *target;
    let vocab = Spec::for_checkpoint(checkpoint)?.vocab;
    let drawn = vec![vec![0; windows.seqlen]; windows.nsamples];
    let source = SourceReport {
        name: SELF.into(),
        kind: SELF.into(),
        windows: windows.nsamples,
        ..SourceReport::default()
    };
    let report = CalibrationReport::new(vec![source], &drawn, &windows, vocab);
    let planned = CalibrationSet::from_windows(drawn, report);
    if target.dry_run {
        return Ok(planned);
    }
    let planned = match read {
        Some(read) => read.clone().followed_by(planned, vocab),
        None => planned,
    };
    let job = Job {
        checkpoint,
        tokenizer: Some(tokenizer),
        model: target.model,
        calibration: Some(&planned),
        options: target.options,
        output: Path::new(""),
        plots: None,
        float_stream: None,
        pool,
    };
    (target.announce)(&plan(&job)?, &job);
    drop(planned);
    view.phase("load");
    // Opened again: its pages leave memory when the text is written.
    let own = Checkpoint::open(&checkpoint.path)?;
    let model = Model::load_with(&own, &LoadOptions { pool: Some(pool), ..Default::default() })?;
    let mut session = Session::new(Arc::clone(pool));
    let mut writer = SelfCalibration::new(windows);
    writer.temperature = request.temperature;
    writer.top_k = request.top_k;
    self_calibrate(&model, &mut session, tokenizer, &writer, view)
        .map_err(|error| explain(checkpoint, error))
}
