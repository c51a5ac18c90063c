//! A family as a file: `--family FILE.toml` describes an architecture that has no table here, without recompiling, as a
//! built-in family and what differs from it.
//!
//! ```toml
//! model_type = "mymodel"          # of the config.json that it is for; left out: of every one
//! base = "llama"                  # whatever is not said here is as there
//!
//! [config]                        # key that the base reads = key of this model's config.json
//! hidden_size = "d_model"
//!
//! [defaults]                      # value of a key (of the base) that config.json does not have
//! attention_bias = true
//!
//! [stages]                        # linears of a block, in the order in which they run
//! qkv = ["attn.query", "attn.key", "attn.value"]
//! ```
//!
//! The sections are those of [`FamilyTable`]; `gptq families NAME` prints a built-in family in this form. What a family
//! decides by the config ([`describe`]) is left to the base.

mod apply;
mod describe;
mod leaves;
mod print;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gptq_format::{Config, FormatError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::families::FAMILIES;
use crate::spec::Spec;
use crate::{ModelError, Result};

pub use describe::{Description, Key, describe};

/// A family of a file. Every field but `base` may be left out and is then as in the base; an empty name says that there is
/// no such part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FamilyTable {
    /// `model_type` of the config.json that the table is for; `None`: of every one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_type: Option<String>,
    /// The built-in family that it starts from.
    pub base: String,
    /// Keys that the base reads, and the keys of this model's config.json that they are taken from.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<String, String>,
    /// Values of the base's keys where config.json has none.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub defaults: Map<String, Value>,
    /// Keys of config.json that do not change what the model computes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// Everything outside the blocks.
    pub modules: Modules,
    /// The linears of a block.
    pub stages: Stages,
    /// A mixture of experts.
    pub experts: Experts,
    /// Norms.
    pub norms: Norms,
    /// The attention's arithmetic.
    pub attention: AttentionTable,
    /// The MLP's arithmetic.
    pub mlp: MlpTable,
    /// The wiring.
    pub residual: ResidualTable,
    /// From the last hidden state to logits.
    pub head: HeadTable,
}

/// Declares sections whose fields may all be left out.
macro_rules! sections {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$field_doc])*
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $field: Option<$kind>,)*
        }
    )*};
}

sections! {
    /// Names outside the blocks; all but the head's are relative to `prefix`, and without `.weight`.
    Modules {
        /// Beginning of all names but the head's, with its dot, for example `model.`.
        prefix: String,
        /// The list of blocks, for example `layers`.
        blocks: String,
        /// Token embedding.
        embedding: String,
        /// Table of learned positions.
        positions: String,
        /// Embedding of token types.
        token_types: String,
        /// Norm of the embedding.
        embedding_norm: String,
        /// Linear between embedding and first block.
        project_in: String,
        /// Norm after the last block.
        final_norm: String,
        /// Linear between last block and head.
        project_out: String,
        /// Projection to logits, full name.
        head: String,
    }
    /// Linears of a block by stage, relative to the block; those of a stage share an input.
    Stages {
        /// Queries, keys, values; or one linear with all of them (see `attention.fused_order`).
        qkv: Vec<String>,
        /// Projection of the attention's output.
        attention_out: String,
        /// Gate and up; or one linear: both together if `mlp.gated`, else the only one.
        mlp_up: Vec<String>,
        /// Projection back.
        mlp_down: String,
        /// Linears are stored `[in, out]` (GPT-2's Conv1D).
        transposed: bool,
    }
    /// A mixture of experts; names relative to the block, those of the linears to the expert.
    Experts {
        /// The router.
        router: String,
        /// The list of experts.
        list: String,
        /// Gate and up of an expert; or one linear.
        up: Vec<String>,
        /// Projection back.
        down: String,
        /// The weights of a token's experts are divided by their sum.
        renormalize: bool,
    }
    /// Norms; names relative to the block.
    Norms {
        /// Formula of all of them.
        kind: NormName,
        /// They have a weight.
        weight: bool,
        /// They have a bias.
        bias: bool,
        /// Of the attention's input.
        before_attention: String,
        /// Of the attention's output, before it is added to the stream.
        after_attention: String,
        /// Of the stream after the attention is added.
        stream_attention: String,
        /// Of the MLP's input.
        before_mlp: String,
        /// Of the MLP's output, before it is added to the stream.
        after_mlp: String,
        /// Of the stream after the MLP is added.
        stream_mlp: String,
        /// Of the queries, before rotation.
        queries: String,
        /// Of the keys, before rotation.
        keys: String,
        /// What the norms of queries and keys go over.
        over: OverName,
    }
    /// The attention's arithmetic.
    AttentionTable {
        /// Queries, keys and values have a bias.
        qkv_bias: bool,
        /// The output projection has a bias.
        out_bias: bool,
        /// Order of the outputs of one linear for all three.
        fused_order: OrderName,
        /// Scores are multiplied by this.
        scale: f64,
        /// A query sees no later key.
        causal: bool,
        /// Which columns of a head rotate as a pair.
        rope: RopeName,
    }
    /// The MLP's arithmetic.
    MlpTable {
        /// `down(activation(gate(x)) * up(x))`, else `down(activation(up(x)))`.
        gated: bool,
        /// As in transformers' ACT2FN.
        activation: String,
        /// The linears have a bias.
        bias: bool,
    }
    /// The wiring of a block.
    ResidualTable {
        /// Attention and MLP side by side.
        parallel: bool,
        /// Outputs are added to the normalised input.
        from_norm: bool,
        /// Factor of each sublayer's output.
        multiplier: f64,
    }
    /// From the last hidden state to logits.
    HeadTable {
        /// The token embedding is the projection.
        tied: bool,
        /// The projection has a bias.
        bias: bool,
        /// Factor of the logits.
        scale: f64,
    }
}

/// Declares names that stand for one value each.
macro_rules! names {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }
    )*};
}

names! {
    /// A norm's formula.
    NormName {
        /// Root mean square.
        Rms,
        /// Root mean square, times 1 + weight.
        RmsPlusOne,
        /// Layer norm.
        Layer,
    }
    /// See [`crate::spec::NormOver`].
    OverName {
        /// All heads together.
        Row,
        /// Each head, one weight for all.
        Head,
        /// Each head with a row of the weight.
        OwnHead,
        /// Each head with a tensor of its own.
        ListedHead,
    }
    /// See [`crate::fused::FusedOrder`].
    OrderName {
        /// Queries, keys, values.
        Concat,
        /// By key head: its queries, key, value.
        Grouped,
        /// CodeGen's four devices.
        FourDevices,
    }
    /// Which columns of a head rotate as a pair.
    RopeName {
        /// Column i and i + half.
        Half,
        /// Neighbours.
        Interleaved,
    }
}

/// The table of the command line.
static INSTALLED: OnceLock<FamilyTable> = OnceLock::new();

impl FamilyTable {
    /// Reads a table.
    ///
    /// # Errors
    /// A file that cannot be read, is no TOML, has a section, key or value that does not exist, or contradicts itself; the
    /// error says where and what is possible.
    pub fn from_file(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(FormatError::io("read", file))?;
        Self::parse(&text)
            .map_err(|reason| ModelError::FamilyFile { file: file.to_owned(), reason })
    }

    /// Reads a table from TOML; the error says what is wrong.
    ///
    /// # Errors
    /// As [`FamilyTable::from_file`].
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let table: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if table.base.is_empty() {
            return Err(format!(
                "`base` is missing: the built-in family that the model is most like, one of {}",
                known()
            ));
        }
        if !FAMILIES.iter().any(|family| family.model_type == table.base) {
            let base = &table.base;
            return Err(format!("base = \"{base}\" is no built-in family; those are {}", known()));
        }
        table.check()?;
        Ok(table)
    }

    /// Makes this the table of the process: configs that it is for are read with it from now on. The first call counts.
    pub fn install(self) {
        let _ = INSTALLED.set(self);
    }

    /// The installed table, if it is for such a config.
    pub(crate) fn installed(config: &Config) -> Option<&'static Self> {
        let model_type = config.map().get("model_type").and_then(Value::as_str);
        INSTALLED
            .get()
            .filter(|table| table.model_type.is_none() || table.model_type.as_deref() == model_type)
    }

    /// The architecture that a config describes, read with this table.
    ///
    /// # Errors
    /// As [`Spec::from_config`]; a table that contradicts what the base makes of the config.
    pub fn spec(&self, config: &Config) -> Result<Spec> {
        let map = self
            .translate(config.map())
            .map_err(|reason| ModelError::FamilyFile { file: config.path().to_owned(), reason })?;
        let mut spec = Spec::built_in(config.path(), &map)?;
        self.apply(&mut spec).map_err(|reason| ModelError::FamilyFile {
            file: PathBuf::from(format!("family of base {}", self.base)),
            reason,
        })?;
        Ok(spec)
    }

    /// The config in the words of the base.
    fn translate(
        &self,
        config: &Map<String, Value>,
    ) -> std::result::Result<Map<String, Value>, String> {
        let mut map = config.clone();
        let renamed = self.config.iter().filter(|(to, from)| to != from);
        for (_, from) in renamed.clone() {
            map.shift_remove(from);
        }
        for (to, from) in renamed {
            let Some(value) = config.get(from) else { continue };
            if map.insert(to.clone(), value.clone()).is_some() {
                return Err(format!(
                    "the config has both \"{from}\" and \"{to}\", and the family file takes {to} from \"{from}\""
                ));
            }
        }
        for key in &self.ignore {
            map.shift_remove(key);
        }
        for (key, value) in &self.defaults {
            if map.get(key).is_none_or(Value::is_null) {
                map.insert(key.clone(), value.clone());
            }
        }
        map.insert("model_type".to_owned(), Value::from(self.base.clone()));
        Ok(map)
    }
}

/// Names of the built-in families.
fn known() -> String {
    let names: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests;
