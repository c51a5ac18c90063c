use super::*;

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens = tokens.map(|(k, v)| (k.to_owned(), v.to_owned()));
    ChatTemplate::new("chat_template.jinja", source, tokens.into()).unwrap()
}

fn conversation() -> [Message; 2] {
    [Message::new("user", " Hi <b> "), Message::new("assistant", "Hello")]
}

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn render(source: &str) -> String {
    template(source).render(&conversation(), true, NOW).unwrap()
}

/// The error of compiling or rendering.
fn fails(source: &str) -> ChatError {
    ChatTemplate::new("t.jinja", source, BTreeMap::new())
        .and_then(|t| t.render(&conversation(), false, NOW).map(|_| ()))
        .unwrap_err()
}

#[test]
fn a_conversation_is_rendered() {
    let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'].strip() }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}[assistant]{% endif %}";
    // One newline inside the loop is text, the one after endfor belongs to the block.
    assert_eq!(render(source), "<s>[user] Hi <b></s>\n[assistant] Hello</s>\n[assistant]");
}

#[test]
fn blocks_leave_no_whitespace() {
    assert_eq!(render("a\n    {% if true %}\nb\n    {% endif %}\nc"), "a\nb\nc");
    // One trailing newline goes, as in Jinja.
    assert_eq!(render("x\n"), "x");
}

#[test]
fn python_methods_and_jinja_extensions_work() {
    assert_eq!(render("{{ 'a,b'.split(',')[1].upper() }}{{ 'abc'.startswith('ab') }}"), "BTrue");
    assert_eq!(render("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"), "a1");
    assert_eq!(render("{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}"), "au");
    assert_eq!(
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
        "01"
    );
    assert_eq!(
        render(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        ),
        "2"
    );
    assert_eq!(
        render(
            "{{ tools is none }}{{ documents is none }}{{ undefined_thing }}|{{ messages[0].tool_calls is defined }}"
        ),
        "TrueTrue|False"
    );
    assert_eq!(
        render("{%- generation -%} x {%- endgeneration %}{% generation %}y{% endgeneration %}"),
        "xy"
    );
}

#[test]
fn tojson_is_pythons() {
    let value = "{'b': [1, 2.5, none, true], 'a': 'é<&\"'}";
    assert_eq!(
        render(&format!("{{{{ {value} | tojson }}}}")),
        r#"{"b": [1, 2.5, null, true], "a": "é<&\""}"#
    );
    assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}"), "{\n  \"a\": [\n    1\n  ]\n}");
    assert_eq!(fails("{{ 1 | tojson(indent=100000000) }}").line, Some(1));
}

#[test]
fn the_date_is_the_callers() {
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}"), "01 Jan 1970");
    assert_eq!(render("{% if strftime_now is defined %}a{% endif %}"), "a");
    assert_eq!(render("{% macro f() %}{{ strftime_now('%Y') }}{% endmacro %}{{ f() }}"), "1970");
}

#[test]
fn errors_name_template_and_line() {
    let e = fails("one\ntwo\n{{ raise_exception('roles must alternate') }}");
    assert_eq!(e.line, Some(3));
    assert_eq!(e.to_string(), "chat template `t.jinja`, line 3: roles must alternate");
    assert_eq!(fails("a\n{% if %}").line, Some(2));
    assert_eq!(fails("{{ messages[7].content.strip() }}").line, Some(1));
    assert!(fails(&"x".repeat(MAX_SOURCE + 1)).reason.contains("1048577"));
}

#[test]
fn a_template_that_does_not_end_is_stopped() {
    let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let e = fails(nested);
    assert!(e.reason.contains("fuel"), "{e}");
    let e = fails("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}");
    assert!(e.reason.contains("recursion"), "{e}");
    let e = fails(&format!("{{% for a in range(99999) %}}{}{{% endfor %}}", "x".repeat(1000)));
    assert!(e.reason.contains("output exceeds"), "{e}");
    assert!(
        !fails(&format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)))
            .reason
            .is_empty()
    );
    assert!(!fails("{{ range(10 ** 12) | list }}").reason.is_empty());
    assert!(!fails("{{ 'x' * 10 ** 12 }}").reason.is_empty());
}

#[test]
fn a_tag_that_shares_its_ends_is_an_error() {
    for source in ["{%}", "a {%} b", "{%}%}", "{% generation %}{%}"] {
        assert!(!fails(source).reason.is_empty(), "{source}");
    }
}

#[test]
fn files_are_out_of_reach() {
    for source in [
        "{% include '/etc/passwd' %}",
        "{% extends '../secret' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ] {
        assert_eq!(fails(source).line, Some(1), "{source}");
    }
}
