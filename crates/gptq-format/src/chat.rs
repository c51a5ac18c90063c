//! Chat templates: Jinja, with the functions and settings that transformers gives them.
//!
//! A template comes with a checkpoint and is not trusted: it sees the messages and the special tokens and nothing else (no
//! files, no other templates), and its instructions, recursion, output, memory and time are limited.

mod clock;
mod functions;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

/// Longest template source that is compiled, in bytes. The longest published ones have some 20 KB.
const MAX_SOURCE: usize = 1 << 20;
/// Instructions one rendering may execute; a message takes some hundred.
const FUEL: u64 = 10_000_000;
/// Depth of nested blocks and macro calls (a call counts about ten).
const MAX_DEPTH: usize = 300;
/// Longest text one rendering may write, in bytes.
const MAX_OUTPUT: usize = 64 << 20;

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or whatever else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Why a chat template could not be compiled or rendered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("chat template `{name}`{}: {reason}", line.map(|l| format!(", line {l}")).unwrap_or_default())]
pub struct ChatError {
    /// The template's name: the file or key it came from.
    pub name: String,
    /// The line of the template, from 1, where it is known.
    pub line: Option<usize>,
    /// What went wrong.
    pub reason: String,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    name: String,
    source: String,
    variables: BTreeMap<String, String>,
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles `source`. `name` appears in error messages; `variables` are the special tokens that the template sees
    /// (`bos_token`, `eos_token`, ...).
    ///
    /// # Errors
    /// [`ChatError`] with the line if the source is no valid template, or is longer than 1 MiB.
    pub fn new(
        name: &str,
        source: &str,
        variables: BTreeMap<String, String>,
    ) -> Result<Self, ChatError> {
        if source.len() > MAX_SOURCE {
            let reason = format!("has {} bytes, more than the {MAX_SOURCE} allowed", source.len());
            return Err(given_up(name, reason));
        }
        // The settings of transformers' sandboxed environment.
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| chat_error(name, &e))?;
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", functions::tojson);
        environment.add_function("raise_exception", functions::raise_exception);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_DEPTH);
        let (owned, text) = (name.to_owned(), functions::without_generation_tags(source));
        // Constant expressions are computed here.
        let compile = move || environment.add_template_owned(owned, text).map(|()| environment);
        let environment = watch::watched(compile)
            .map_err(|reason| given_up(name, reason))?
            .map_err(|e| chat_error(name, &e))?;
        Ok(Self { name: name.into(), source: source.into(), variables, environment })
    }

    /// The template's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The source, as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation; with `add_generation_prompt`, followed by what opens the assistant's turn. `now` is what the
    /// template's `strftime_now` tells, in UTC.
    ///
    /// # Errors
    /// [`ChatError`] with the line if the template raises an exception, fails, or exceeds a limit. One that exceeds the limit
    /// of memory or time runs on in a thread of its own until it fails or the process ends.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now: SystemTime,
    ) -> Result<String, ChatError> {
        let values = context! {
            messages => Serde(messages),
            add_generation_prompt,
            strftime_now => Value::from_function(move |format: &str| clock::strftime(format, now)),
            tools => (),
            documents => (),
            ..Value::from(Serde(&self.variables))
        };
        let (environment, name) = (self.environment.clone(), self.name.clone());
        let render = move || {
            let mut output = Limited(Vec::new());
            environment.get_template(&name)?.render_captured_to(values, &mut output)?;
            Ok::<_, minijinja::Error>(output.0)
        };
        let output = watch::watched(render)
            .map_err(|reason| given_up(&self.name, reason))?
            .map_err(|e| chat_error(&self.name, &e))?;
        String::from_utf8(output).map_err(|e| given_up(&self.name, e.to_string()))
    }
}

/// An error of the template as a whole.
fn given_up(name: &str, reason: String) -> ChatError {
    ChatError { name: name.into(), line: None, reason }
}

fn chat_error(name: &str, error: &minijinja::Error) -> ChatError {
    let mut reason = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        reason = format!("{reason}: {inner}");
        source = inner.source();
    }
    ChatError { name: name.into(), line: error.line(), reason }
}

/// Collects output up to [`MAX_OUTPUT`] bytes.
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("the output exceeds {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
