//! What transformers adds to Jinja for chat templates.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize as _;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

/// `raise_exception(message)`: the template refuses its input.
pub(super) fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// `value | tojson(indent=None)` as Python's `json.dumps(value, ensure_ascii=False)` writes it: a space after `,` and `:`,
/// nothing escaped for HTML.
#[allow(clippy::needless_pass_by_value, reason = "a filter takes its options so")]
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let message = "tojson(ensure_ascii=true) is not supported";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    options.assert_all_used()?;
    match indent {
        // An indent is a run of spaces; a width beyond this is an attack on memory.
        Some(n) if n > 64 => {
            Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent above 64"))
        }
        Some(n) => dump(value, PrettyFormatter::with_indent(" ".repeat(n).as_bytes())),
        None => dump(value, PythonFormatter(CompactFormatter)),
    }
}

fn dump(value: &Value, formatter: impl Formatter) -> Result<String, Error> {
    let fail = |e: String| Error::new(ErrorKind::BadSerialization, e);
    // Lists that share their elements write far more than they take.
    let mut out = super::Limited(Vec::new());
    value
        .serialize(&mut Serializer::with_formatter(&mut out, formatter))
        .map_err(|e| fail(e.to_string()))?;
    String::from_utf8(out.0).map_err(|e| fail(e.to_string()))
}

/// Python's default separators `", "` and `": "`.
struct PythonFormatter(CompactFormatter);

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        self.0.begin_object_value(writer)?;
        writer.write_all(b" ")
    }
}

/// `source` with transformers' `{% generation %}` blocks, which mark the assistant's text for training masks and render as
/// their content, replaced by `{% if true %}`.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        // Behind the opening: in `{%}` the two share a character.
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = &tag[2..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        match word {
            "generation" => out.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen(word, "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
