"""ChatGLM 2 and 3 and the authors' GLM-4 are not in transformers: a `glm` model of transformers is rewritten as one of them.

Names, keys and the order of fused weights are those of the published repositories (THUDM/chatglm3-6b, THUDM/glm-4-9b); that
transformers' own conversion of GLM-4 goes the other way is what makes the comparison a proof.
"""

import json

import torch
from safetensors.torch import load_file, save_file

NAMES = [
    ("model.embed_tokens.", "transformer.embedding.word_embeddings."),
    ("model.norm.", "transformer.encoder.final_layernorm."),
    ("model.layers.", "transformer.encoder.layers."),
    ("lm_head.", "transformer.output_layer."),
    ("self_attn.o_proj.", "self_attention.dense."),
    ("mlp.gate_up_proj.", "mlp.dense_h_to_4h."),
    ("mlp.down_proj.", "mlp.dense_4h_to_h."),
]
# Of the published ChatGLMConfig.
DEFAULTS = dict(
    layernorm_epsilon=1e-5, rmsnorm=True, apply_residual_connection_post_layernorm=False, post_layer_norm=True,
    add_bias_linear=False, add_qkv_bias=False, bias_dropout_fusion=True, multi_query_attention=False, multi_query_group_num=1,
    rope_ratio=1, apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True, fp32_residual_connection=False,
    quantization_bit=0, pre_seq_len=None, prefix_projection=False, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def renamed(name):
    for old, new in NAMES:
        name = name.replace(old, new)
    return name


def config_of(glm):
    """The config of the rewritten model."""
    heads, groups = glm["num_attention_heads"], glm["num_key_value_heads"]
    theta = glm["rope_parameters"]["rope_theta"]
    return DEFAULTS | dict(
        architectures=["ChatGLMModel"], model_type="chatglm", auto_map={"AutoModel": "modeling_chatglm.ChatGLMModel"},
        num_layers=glm["num_hidden_layers"], hidden_size=glm["hidden_size"], ffn_hidden_size=glm["intermediate_size"],
        padded_vocab_size=glm["vocab_size"], seq_length=glm["max_position_embeddings"], num_attention_heads=heads,
        kv_channels=glm["head_dim"], layernorm_epsilon=glm["rms_norm_eps"], add_qkv_bias=glm["attention_bias"],
        multi_query_attention=groups != heads, multi_query_group_num=groups if groups != heads else 1,
        original_rope=True, rope_ratio=theta / 10000.0, tie_word_embeddings=False, torch_dtype="float32",
    )  # fmt: skip


def rewrite(directory):
    """Rewrites the checkpoint in `directory`."""
    config = json.loads((directory / "config.json").read_text())
    old = load_file(directory / "model.safetensors")
    new, width = {}, config["head_dim"]
    for name, tensor in old.items():
        if ".q_proj." in name:
            parts = [old[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            if config["num_key_value_heads"] == config["num_attention_heads"]:
                # Head by head its query, key and value.
                parts = [part.unflatten(0, (-1, width)) for part in parts]
                fused = torch.stack(parts, 1).flatten(0, 2)
            else:
                fused = torch.cat(parts)
            new[renamed(name.replace("self_attn.q_proj", "self_attention.query_key_value"))] = fused.contiguous()
        elif ".k_proj." not in name and ".v_proj." not in name:
            new[renamed(name)] = tensor
    new["transformer.rotary_pos_emb.inv_freq"] = 1.0 / 10000.0 ** (torch.arange(0, width // 2, 2) / (width // 2))
    save_file(new, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config_of(config), indent=2))


def short(config):
    """The config without what the definition has as default."""
    return {key: value for key, value in config.items() if key not in DEFAULTS or DEFAULTS[key] != value}
