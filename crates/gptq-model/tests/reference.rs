//! docs/reference/families.md says what the tables do: run with GPTQ_UPDATE_DOCS=1 to write it.

use std::fmt::Write;

use gptq_model::FAMILIES;
use gptq_model::table::describe;
use gptq_testkit::fixtures;

const INTRODUCTION: &str = "# Families

Generated from the tables; a test fails when it is out of date.

A family is the `model_type` of a config.json. Each is one table in `crates/gptq-model/src/families`; below it is printed as
`gptq families NAME` prints it, in the form of a file for `--family`:

- `[config]` lists every key of config.json that the family reads. A key that sounds as if it changed the result and is not
  read is an error that names it, as are values that are not implemented.
- The other sections say what is the same for all models of the family. What the config decides is a comment that names the
  keys.

A model that is like one of these is described by a file with its own `model_type`, a `base`, and what differs:

```toml
model_type = \"mymodel\"          # of the config.json that it is for; left out: of every one
base = \"llama\"                  # whatever is not said is as there

[config]                        # key that the base reads = key of this model's config.json
hidden_size = \"d_model\"

[defaults]                      # value of a key of the base that config.json does not have
attention_bias = true

[modules]
prefix = \"body.\"

[stages]                        # linears of a block in running order; those of a stage share an input
qkv = [\"attn.query\", \"attn.key\", \"attn.value\"]
```

`ignore = [\"key\"]` beside `base` names keys of config.json without effect. An empty name says that a part does not exist.
One name instead of three in `stages.qkv` is a fused linear, whose order `attention.fused_order` gives.
";

#[test]
fn the_reference_of_families_is_up_to_date() {
    let mut text = INTRODUCTION.to_owned();
    text.push_str("\n| family | reads | what it is |\n|---|---|---|\n");
    let families: Vec<_> =
        FAMILIES.iter().map(|family| describe(family.model_type).unwrap()).collect();
    for family in &families {
        let name = family.family.model_type;
        let reads = if family.causal { "forward" } else { "both ways" };
        let about = family.family.about().replace('\n', " ");
        let _ = writeln!(text, "| [{name}](#{name}) | {reads} | {about} |");
    }
    for family in &families {
        let name = family.family.model_type;
        let _ = write!(text, "\n## {name}\n\n```toml\n{}```\n", family.to_toml());
    }
    let path = fixtures::workspace().join("docs/reference/families.md");
    if std::env::var_os("GPTQ_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "run GPTQ_UPDATE_DOCS=1 cargo test -p gptq-model --test reference");
}
