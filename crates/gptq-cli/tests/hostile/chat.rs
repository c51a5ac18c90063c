//! Chat templates: they come with a model and are programs.

use serde_json::json;

use crate::{GENERATE, QUANTIZE, world};

const CHAT: &str = "generate model --chat hi --max-new-tokens 2 -q";
const ENDLESS: &str =
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";

#[test]
fn chat_templates_that_do_not_end_or_reach_for_files() {
    let world = world();
    world.write("model/secret.txt", "SECRET");
    for (template, part) in [
        (ENDLESS, "fuel"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "output exceeds"),
        ("{{ 'x' * 10 ** 12 }}", "chat template"),
        ("{{ range(10 ** 12) | list }}", "chat template"),
        ("{% include 'secret.txt' %}", "chat template"),
        ("{% include '/etc/passwd' %}", "chat template"),
        ("{% extends '../model/secret.txt' %}", "chat template"),
        ("{% import 'os' as os %}{{ os.environ }}", "chat template"),
        ("{{ open('model/secret.txt').read() }}", "chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
        ("{% for", "chat template"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ] {
        world.edit("model/tokenizer_config.json", |c| c["chat_template"] = json!(template));
        world.refuses(CHAT, &["chat template", part]);
    }
    // Who does not chat does not need it.
    world.ok(GENERATE);
    world.write("model/chat_template.jinja", vec![b'x'; (1 << 20) + 1]);
    world.refuses(CHAT, &["chat_template.jinja"]);
}

/// Texts and lists that double with every step: no count of steps is a bound on their memory.
#[test]
fn chat_templates_that_fill_the_memory() {
    let world = world();
    let doubled = |step: &str, then: &str| {
        format!(
            "{{% set ns = namespace(s='xxxxxxxx', l=[1]) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{then}"
        )
    };
    let held = "more than 256 MiB of memory";
    for (template, part) in [
        (doubled("{% set ns.s = ns.s ~ ns.s %}", "{{ ns.s | length }}"), held),
        (doubled("{% set ns.s = ns.s + ns.s %}", "{{ ns.s | length }}"), held),
        (doubled("{% set ns.s = ns.s | replace('x', 'xx') %}", "{{ ns.s | length }}"), held),
        (
            doubled(
                "{% set s %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = s %}",
                "{{ ns.s[0] }}",
            ),
            held,
        ),
        (
            "{% set a = 'xxxxxxxx' %}".to_owned()
                + &"{% set a = a ~ a %}".repeat(60)
                + "{{ a[0] }}",
            held,
        ),
        (
            doubled("{% set ns.l = [ns.l, ns.l] %}", "{{ ns.l | tojson | length }}"),
            "output exceeds",
        ),
        (doubled("{% set ns.l = [ns.l, ns.l] %}", "{{ ns.l }}"), "output exceeds"),
    ] {
        world.edit("model/tokenizer_config.json", |c| c["chat_template"] = json!(template));
        world.refuses(CHAT, &["chat template", part]);
    }
}

#[test]
fn chats_to_calibrate_with_meet_the_same_limits() {
    let world = world();
    world.write("chat.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n");
    let line = QUANTIZE.replace("text.txt", "chat.jsonl");
    for (template, part) in [(ENDLESS, "fuel"), ("{% include '/etc/passwd' %}", "chat template")] {
        world.edit("model/tokenizer_config.json", |c| c["chat_template"] = json!(template));
        world.refuses(&line, &["chat.jsonl", "line 1", part]);
    }
}
