//! Findings and their collection.

use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// No reader gets it right.
    Error,
    /// Some readers do not get it right.
    Warning,
    /// Worth knowing.
    Note,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What kind it is, for programs: `zero-point-zero`.
    pub code: &'static str,
    /// The module, tensor or file that it is about, if it is about one.
    pub subject: Option<String>,
    /// What was found, in a sentence.
    pub message: String,
    /// What to do about it.
    pub hint: Option<&'static str>,
}

/// Findings as they are collected.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    pub(super) fn error(
        &mut self,
        code: &'static str,
        subject: Option<&str>,
        message: impl Into<String>,
        hint: Option<&'static str>,
    ) {
        self.add(Severity::Error, code, subject, message.into(), hint);
    }

    pub(super) fn warning(
        &mut self,
        code: &'static str,
        subject: Option<&str>,
        message: impl Into<String>,
        hint: Option<&'static str>,
    ) {
        self.add(Severity::Warning, code, subject, message.into(), hint);
    }

    pub(super) fn note(
        &mut self,
        code: &'static str,
        subject: Option<&str>,
        message: impl Into<String>,
        hint: Option<&'static str>,
    ) {
        self.add(Severity::Note, code, subject, message.into(), hint);
    }

    pub(super) fn has_errors(&self) -> bool {
        self.0.iter().any(|finding| finding.severity == Severity::Error)
    }

    /// The worst first, otherwise in the order in which they were found.
    pub(super) fn sorted(mut self) -> Vec<Finding> {
        self.0.sort_by_key(|finding| finding.severity);
        self.0
    }

    fn add(
        &mut self,
        severity: Severity,
        code: &'static str,
        subject: Option<&str>,
        message: String,
        hint: Option<&'static str>,
    ) {
        let subject = subject.map(str::to_owned);
        self.0.push(Finding { severity, code, subject, message, hint });
    }
}
