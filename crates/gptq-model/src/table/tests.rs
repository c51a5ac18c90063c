use gptq_testkit::fixtures;
use serde_json::json;

use super::*;
use crate::spec::{Mlp, Qkv};

fn config(value: &Value) -> Config {
    Config::new(Path::new("some/config.json"), value.as_object().unwrap().clone())
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128
    })
}

#[test]
fn every_family_printed_and_read_again_changes_nothing() {
    for family in FAMILIES {
        let name = family.model_type;
        let text = describe(name).unwrap_or_else(|| panic!("{name} cannot be described")).to_toml();
        let table =
            FamilyTable::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        let said = |section: &str| sections_of(&table, section);
        assert!(said("modules") >= 3 && said("stages") >= 2, "{name}: {text}");
        for (_, directory) in fixtures::all() {
            for file in ["config.json", "config.v4.json"] {
                let path = directory.join(file);
                let Ok(text) = std::fs::read_to_string(&path) else { continue };
                let Ok(Value::Object(map)) = serde_json::from_str(&text) else { continue };
                if map.get("model_type").and_then(Value::as_str) == Some(name) {
                    let config = Config::new(&path, map);
                    let expected = Spec::from_config(&config).unwrap();
                    assert_eq!(table.spec(&config).unwrap(), expected, "{}", path.display());
                }
            }
        }
    }
}

fn sections_of(table: &FamilyTable, section: &str) -> usize {
    describe::sections(table)[section].as_object().map_or(0, Map::len)
}

#[test]
fn a_llama_under_other_names_is_a_llama() {
    let table = FamilyTable::parse(
        r#"
        model_type = "mymodel"
        base = "llama"
        ignore = ["attention_kind"]
        [config]
        hidden_size = "d_model"
        num_hidden_layers = "depth"
        [defaults]
        attention_bias = true
        [modules]
        prefix = "body."
        blocks = "h"
        [stages]
        qkv = ["attn.qkv"]
        mlp_up = ["ffn.in"]
        [norms]
        kind = "layer"
        after_mlp = "ffn.post"
        [attention]
        fused_order = "grouped"
        rope = "interleaved"
        [mlp]
        gated = false
        activation = "relu2"
        "#,
    )
    .unwrap();
    let mut mine = llama();
    let map = mine.as_object_mut().unwrap();
    map.insert("model_type".into(), json!("mymodel"));
    for (from, to) in [("hidden_size", "d_model"), ("num_hidden_layers", "depth")] {
        let value = map.remove(from).unwrap();
        map.insert(to.into(), value);
    }
    map.insert("attention_kind".into(), json!("usual"));
    let spec = table.spec(&config(&mine)).unwrap();
    assert_eq!((spec.hidden, spec.layer_count()), (64, 2));
    assert_eq!(spec.block_name(1), "body.h.1");
    assert!(
        spec.attention.qkv_bias
            && matches!(spec.attention.qkv, Qkv::Fused { name: "attn.qkv", .. })
    );
    assert!(matches!(spec.mlp, Mlp::Plain { up: "ffn.in", down: "mlp.down_proj", width: 128, .. }));
    assert_eq!(spec.residual.mlp.after, Some("ffn.post"));
    map_insert(&mut mine, "hidden_size", json!(7));
    let error = table.spec(&config(&mine)).unwrap_err().to_string();
    assert!(error.contains("d_model") && error.contains("hidden_size"), "{error}");
}

fn map_insert(value: &mut Value, key: &str, new: Value) {
    value.as_object_mut().unwrap().insert(key.to_owned(), new);
}

#[test]
fn what_is_wrong_is_named_with_what_is_possible() {
    let refused = |text: &str, parts: &[&str]| {
        let error = FamilyTable::parse(text).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{error}: lacks {part}");
        }
    };
    refused("", &["base", "llama"]);
    refused("base = \"lama\"", &["lama", "llama"]);
    refused("base = \"llama\"\n[stage]\n", &["stage", "stages"]);
    refused("base = \"llama\"\n[stages]\nqvk = []", &["line 3", "qvk", "attention_out"]);
    refused("base = \"llama\"\n[stages]\nqkv = [\"a\", \"b\"]", &["stages.qkv", "2", "3"]);
    refused("base = \"llama\"\n[stages]\nmlp_up = []", &["stages.mlp_up"]);
    refused("base = \"llama\"\n[norms]\nkind = \"batch\"", &["batch", "rms", "layer"]);
    refused("base = \"llama\"\n[mlp]\nactivation = \"selu\"", &["selu", "silu"]);
    refused("base = \"llama\"\n[modules]\nprefix = \"model\"", &["modules.prefix", "model."]);
    refused("base = \"llama\"\n[modules]\nembedding = \"\"", &["modules.embedding"]);
    refused("base = \"llama\"\n[attention]\nscale = nan", &["attention.scale"]);
    let contradicts = |text: &str, parts: &[&str]| {
        let error =
            FamilyTable::parse(text).unwrap().spec(&config(&llama())).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{error}: lacks {part}");
        }
    };
    contradicts("base = \"llama\"\n[stages]\nqkv = [\"a\"]", &["fused_order"]);
    contradicts(
        "base = \"llama\"\n[stages]\nmlp_up = [\"a\"]\n[mlp]\ngated = false\n[experts]\nup = [\"a\"]",
        &["[experts]", "llama"],
    );
    contradicts("base = \"llama\"\n[mlp]\ngated = false", &["stages", "not gated"]);
    contradicts("base = \"llama\"\n[modules]\npositions = \"wpe\"", &["modules.positions"]);
    contradicts("base = \"llama\"\n[norms]\nqueries = \"q\"", &["norms.queries"]);
    let mut deberta = llama();
    map_insert(&mut deberta, "num_key_value_heads", Value::Null);
    map_insert(&mut deberta, "pos_att_type", json!(["c2p"]));
    map_insert(&mut deberta, "relative_attention", json!(true));
    for text in [
        "[attention]\ncausal = true",
        "[attention]\nfused_order = \"concat\"\n[stages]\nqkv = [\"a\"]",
        "[norms]\nqueries = \"q\"\nkeys = \"k\"",
    ] {
        let table = FamilyTable::parse(&format!("base = \"deberta-v2\"\n{text}")).unwrap();
        let error = table.spec(&config(&deberta)).unwrap_err().to_string();
        assert!(error.contains("deberta-v2 has scores of distances"), "{error}");
    }
}
