"""A tiny model of every family and its variants, for variants.py and every_family.py.

`base` is what AutoConfig.for_model gets; each of `axes` lists alternatives, the first of which is usually the base itself;
`attention` is the implementation that serves as reference (eager by default). Of a family that transformers lacks, `source` is
one that computes the same and `layout` a module that rewrites its checkpoints.
"""

import chatglm

SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def axis(key, *values):
    """Alternatives of one key."""
    return [{key: value} for value in values]


def roped(name, **parameters):
    return {"rope_parameters": {"rope_type": name, "rope_theta": 10000.0, **parameters}}


# Every scaling, for heads of 16 columns that rotate as a whole; `original` lengths are below the length of the input.
ROPES = [
    {},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    roped("linear", factor=4.0),
    {**roped("dynamic", factor=2.0), "max_position_embeddings": 16},
    roped("dynamic", factor=2.0),
    roped("yarn", factor=4.0, original_max_position_embeddings=32),
    roped("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3),
    roped("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=0.5, truncate=False),
    roped("yarn", factor=40.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.9),
    roped("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    {**roped("longrope", factor=4.0, original_max_position_embeddings=32, short_factor=[1.0 + 0.1 * i for i in range(8)],
             long_factor=[1.0 + 0.5 * i for i in range(8)])},
    {**roped("longrope", original_max_position_embeddings=64, short_factor=[1.0 + 0.1 * i for i in range(8)],
             long_factor=[1.0 + 0.5 * i for i in range(8)], attention_factor=1.1)},
]  # fmt: skip

HEADS = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_attention_heads": 8, "num_key_value_heads": 2},
    {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
]
HEAD_DIM = [{}, {"head_dim": 16}, {"head_dim": 24}, {"head_dim": 32}]
GATE = axis("hidden_act", "silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new", "quick_gelu")
PLAIN = axis("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2", "silu", "gelu_python")
TIED = axis("tie_word_embeddings", False, True)
BIAS = axis("attention_bias", False, True)
MLP_BIAS = axis("mlp_bias", False, True)
EPS = axis("rms_norm_eps", 1e-6, 1e-3)
LAYER_EPS = axis("layer_norm_eps", 1e-5, 1e-3)
SIZES = [{}, {"intermediate_size": 176}, {"num_hidden_layers": 1}, {"vocab_size": 259}]


def partial(*shares, theta=10000.0):
    return [{}] + [
        {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}} for share in shares
    ]


LLAMA = [HEADS, HEAD_DIM, ROPES, GATE, TIED, BIAS, EPS, SIZES]
SLIDING = axis("sliding_window", None, 8, 64, 1)
QWEN_WINDOWS = [
    {},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28},
    {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 3,
     "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
]  # fmt: skip
EXPERTS = [
    {},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 3},
    {"norm_topk_prob": True},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [0, 2]},
]
GPT2_BASE = dict(vocab_size=256, n_embd=64, n_layer=3, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2_PLAIN = axis("activation_function", "gelu_new", "gelu", "relu", "gelu_pytorch_tanh", "silu", "relu2")
GPT2_SIZES = [{}, {"n_inner": 96}, {"n_head": 8}, {"n_embd": 96, "n_head": 6}, {"n_layer": 1}]
GPT2_EPS = axis("layer_norm_epsilon", 1e-5, 1e-3)
ENCODER = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
ENCODER_AXES = [
    [{}, {"__class": "AutoModel"}],
    PLAIN,
    [{}, {"num_attention_heads": 8}, {"hidden_size": 96, "num_attention_heads": 6}, {"intermediate_size": 176}],
    [{}, {"type_vocab_size": 1}, {"type_vocab_size": 3}],
    axis("tie_word_embeddings", True, False),
    axis("layer_norm_eps", 1e-12, 1e-3),
]


def mixed_layers(*kinds):
    return {"layer_types": [f"{kind}_attention" for kind in kinds], "num_hidden_layers": len(kinds)}


GEMMA = [
    [{}, {"num_key_value_heads": 1}, {"num_attention_heads": 2}, {"head_dim": 24}, {"head_dim": 32}],
    axis("hidden_activation", "gelu_pytorch_tanh", "gelu", "silu"),
    axis("tie_word_embeddings", True, False),
    BIAS, EPS, SIZES,
]  # fmt: skip

FAMILIES = {
    "llama": dict(base=SMALL, axes=[*LLAMA, MLP_BIAS]),
    "arcee": dict(base=SMALL, axes=[HEADS, HEAD_DIM, ROPES, PLAIN, TIED, BIAS, MLP_BIAS, EPS, SIZES]),
    "mistral": dict(base=SMALL, axes=[HEADS, HEAD_DIM, ROPES, GATE, TIED, EPS, SIZES, SLIDING]),
    "mixtral": dict(
        base={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
        axes=[HEADS, HEAD_DIM, ROPES, GATE, TIED, EPS, SLIDING,
              [{}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}, {"num_local_experts": 7}]],
    ),  # fmt: skip
    "qwen2": dict(base=SMALL, axes=[HEADS, ROPES, GATE, TIED, EPS, SIZES, QWEN_WINDOWS]),
    "qwen2_moe": dict(
        base={**SMALL, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
              "shared_expert_intermediate_size": 48},
        axes=[HEADS, ROPES, GATE, TIED, EPS, EXPERTS, QWEN_WINDOWS, axis("qkv_bias", True, False),
              [{}, {"shared_expert_intermediate_size": 96}, {"moe_intermediate_size": 40}]],
    ),  # fmt: skip
    "qwen3": dict(base={**SMALL, "head_dim": 16}, axes=[*LLAMA, QWEN_WINDOWS]),
    "qwen3_moe": dict(
        base={**SMALL, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        axes=[HEADS, HEAD_DIM, ROPES, GATE, TIED, BIAS, EPS, EXPERTS, QWEN_WINDOWS],
    ),
    "phi": dict(
        base=SMALL,
        axes=[HEADS, PLAIN, TIED, LAYER_EPS, SIZES, axis("qk_layernorm", False, True),
              [*partial(0.25, 0.5, 0.75, 1.0), *ROPES[2:6]]],
    ),  # fmt: skip
    "phi3": dict(
        base={**SMALL, "original_max_position_embeddings": 128},
        axes=[HEADS, GATE, TIED, EPS, SIZES, SLIDING, [
            {},
            *partial(0.5, 0.75),
            *({"original_max_position_embeddings": original, "max_position_embeddings": 128,
               **roped("longrope", short_factor=[1.0 + 0.1 * i for i in range(n)], partial_rotary_factor=share,
                       long_factor=[1.0 + 0.5 * i for i in range(n)], original_max_position_embeddings=original)}
              for original in (16, 64) for n, share in ((8, 1.0), (6, 0.75))),
        ]],
    ),  # fmt: skip
    "gemma": dict(
        base={**SMALL, "head_dim": 16},
        axes=[GEMMA[0], axis("hidden_act", "gelu_pytorch_tanh", "gelu", "silu"),
              axis("hidden_activation", "gelu_pytorch_tanh", "gelu"), *GEMMA[2:], ROPES[:6]],
    ),  # fmt: skip
    "gemma2": dict(
        base={**SMALL, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8},
        axes=[*GEMMA, ROPES[:6], axis("query_pre_attn_scalar", 24, 16, 224), axis("sliding_window", 8, 64),
              axis("attn_logit_softcapping", 50.0, 5.0, None), axis("final_logit_softcapping", 30.0, 10.0, None),
              [{}, mixed_layers("full", "sliding", "sliding"), mixed_layers("full", "full")]],
    ),  # fmt: skip
    "gemma3_text": dict(
        base={**SMALL, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "num_hidden_layers": 4},
        axes=[*GEMMA, axis("query_pre_attn_scalar", 24, 16), axis("sliding_window", 8, 64),
              axis("final_logit_softcapping", None, 10.0), axis("attn_logit_softcapping", None, 5.0),
              [{}, mixed_layers("full", "sliding", "sliding"), mixed_layers("full", "full"), {"num_hidden_layers": 7}],
              [{}, {"rope_parameters": {
                  "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                  "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}]],
    ),  # fmt: skip
    "opt": dict(
        base=dict(vocab_size=256, hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=128, word_embed_proj_dim=64, pad_token_id=1, bos_token_id=0, eos_token_id=2),
        axes=[axis("activation_function", "relu", "gelu", "gelu_new"), axis("do_layer_norm_before", True, False),
              [{}, {"word_embed_proj_dim": 32}], axis("enable_bias", True, False),
              axis("tie_word_embeddings", True, False), axis("layer_norm_elementwise_affine", True, False),
              axis("_remove_final_layer_norm", False, True), [{}, {"num_attention_heads": 8}, {"ffn_dim": 96}]],
    ),  # fmt: skip
    "gpt2": dict(
        base=GPT2_BASE,
        axes=[GPT2_PLAIN, GPT2_SIZES, GPT2_EPS, axis("tie_word_embeddings", True, False),
              axis("scale_attn_weights", True, False), axis("scale_attn_by_inverse_layer_idx", False, True),
              axis("reorder_and_upcast_attn", False, True)],
    ),  # fmt: skip
    "gpt_bigcode": dict(
        base=GPT2_BASE,
        axes=[GPT2_PLAIN, GPT2_SIZES, GPT2_EPS, axis("tie_word_embeddings", True, False), axis("multi_query", True, False),
              axis("scale_attn_weights", True, False)],
    ),  # fmt: skip
    "gpt_neo": dict(
        base=dict(vocab_size=256, hidden_size=64, num_layers=4, num_heads=4, intermediate_size=128, window_size=8,
                  max_position_embeddings=128, attention_types=[[["global", "local"], 2]], pad_token_id=0, bos_token_id=1,
                  eos_token_id=2),
        axes=[GPT2_PLAIN, GPT2_EPS, axis("tie_word_embeddings", True, False), axis("window_size", 8, 64),
              [{}, {"num_heads": 8}, {"intermediate_size": None}],
              [{}, {"attention_types": [[["local"], 1], [["global", "global", "local"], 1]]},
               {"attention_types": [[["global"], 2]], "num_layers": 2}]],
    ),  # fmt: skip
    "gpt_neox": dict(
        base={k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
        axes=[PLAIN, TIED, LAYER_EPS, SIZES, axis("use_parallel_residual", True, False), axis("attention_bias", True, False),
              [{}, {"num_attention_heads": 8}, {"num_attention_heads": 2}],
              [*partial(0.25, 0.5, 1.0), roped("linear", factor=4.0, partial_rotary_factor=0.5),
               roped("yarn", factor=4.0, original_max_position_embeddings=32, partial_rotary_factor=1.0)]],
    ),  # fmt: skip
    "gptj": dict(
        base={**GPT2_BASE, "rotary_dim": 8},
        axes=[GPT2_PLAIN, GPT2_SIZES, GPT2_EPS, TIED, axis("rotary_dim", 8, 4, 16)],
    ),
    "codegen": dict(
        base={**GPT2_BASE, "rotary_dim": 8, "n_ctx": 128},
        axes=[GPT2_PLAIN, [{}, {"n_inner": 96}, {"n_head": 8}, {"n_embd": 128, "n_head": 8}], GPT2_EPS, TIED,
              axis("rotary_dim", 8, 4, 2)],
    ),  # fmt: skip
    "bloom": dict(
        base=dict(vocab_size=256, hidden_size=64, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        axes=[axis("apply_residual_connection_post_layernorm", False, True), GPT2_EPS,
              axis("tie_word_embeddings", True, False),
              [{}, {"n_head": 8}, {"n_head": 2}, {"hidden_size": 96, "n_head": 6}, {"hidden_size": 96, "n_head": 12}]],
    ),  # fmt: skip
    "falcon": dict(
        attention="sdpa",  # eager adds ALiBi twice
        base=dict(vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
                  pad_token_id=0, bos_token_id=1, eos_token_id=2),
        axes=[
            [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2},
             {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
             {"new_decoder_architecture": True, "num_kv_heads": 4},
             {"new_decoder_architecture": True, "num_kv_heads": 1},
             {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
             {"multi_query": True, "alibi": True}, {"parallel_attn": False}],
            axis("bias", False, True), axis("activation", "gelu", "gelu_new", "relu"), axis("tie_word_embeddings", True, False),
            [{}, {"ffn_hidden_size": 96}, {"num_attention_heads": 8}, {"hidden_size": 96, "num_attention_heads": 6}],
            GPT2_EPS, ROPES[:6],
        ],
    ),  # fmt: skip
    "mpt": dict(
        base=dict(vocab_size=256, d_model=64, n_layers=3, n_heads=4, max_seq_len=128, expansion_ratio=4, pad_token_id=0,
                  bos_token_id=1, eos_token_id=2),
        axes=[[{}, {"n_heads": 8}, {"n_heads": 2}, {"d_model": 96, "n_heads": 6}, {"expansion_ratio": 2}],
              [{}, {"attn_config": {"clip_qkv": 1.0}}, {"attn_config": {"softmax_scale": 0.3}},
               {"attn_config": {"alibi_bias_max": 16}}, {"attn_config": {"alibi": False}}, {"attn_config": {"qk_ln": True}}],
              GPT2_EPS, axis("tie_word_embeddings", True, False), axis("no_bias", True, False),
              axis("logit_scale", None, 0.5, "inv_sqrt_d_model")],
    ),  # fmt: skip
    "stablelm": dict(
        base=SMALL,
        axes=[HEADS, GATE, TIED, LAYER_EPS, SIZES, axis("use_qkv_bias", False, True), axis("qk_layernorm", False, True),
              axis("use_parallel_residual", False, True), [*partial(0.25, 0.5, 1.0), roped("linear", factor=4.0)]],
    ),  # fmt: skip
    "starcoder2": dict(
        base=SMALL,
        axes=[HEADS, ROPES, PLAIN, axis("tie_word_embeddings", True, False), axis("norm_epsilon", 1e-5, 1e-3), SIZES, SLIDING,
              axis("use_bias", True, False)],
    ),  # fmt: skip
    "olmo": dict(base=SMALL, axes=[HEADS, ROPES, GATE, TIED, BIAS, SIZES, axis("clip_qkv", None, 1.0, 8.0)]),
    "olmo2": dict(base=SMALL, axes=[HEADS, ROPES, GATE, TIED, BIAS, EPS, SIZES]),
    "granite": dict(
        base=SMALL,
        axes=[*LLAMA, MLP_BIAS, axis("embedding_multiplier", 1.0, 12.0), axis("logits_scaling", 1.0, 8.0),
              axis("residual_multiplier", 1.0, 0.22), axis("attention_multiplier", 1.0, 0.1)],
    ),  # fmt: skip
    "cohere": dict(
        base=SMALL,
        axes=[HEADS, ROPES, GATE, axis("tie_word_embeddings", True, False), BIAS, LAYER_EPS, SIZES,
              axis("logit_scale", 0.0625, 0.5), axis("use_qk_norm", False, True)],
    ),  # fmt: skip
    "glm": dict(
        base={**SMALL, "head_dim": 16},
        axes=[HEADS, HEAD_DIM, GATE, TIED, axis("attention_bias", True, False), EPS, SIZES, partial(0.25, 0.5, 1.0)],
    ),
    "chatglm": dict(  # rewritten from a glm
        base={**SMALL, "head_dim": 16}, source="glm", layout=chatglm,
        axes=[HEADS, HEAD_DIM, axis("attention_bias", True, False), axis("rms_norm_eps", 1.5625e-7, 1e-3), SIZES,
              [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}}]],
    ),  # fmt: skip
    "glm4": dict(
        base={**SMALL, "head_dim": 16},
        axes=[HEADS, HEAD_DIM, GATE, TIED, axis("attention_bias", True, False), EPS, SIZES, partial(0.25, 0.5, 1.0)],
    ),
    "smollm3": dict(
        base={**SMALL, "num_hidden_layers": 5},
        axes=[HEADS, ROPES, GATE, axis("tie_word_embeddings", True, False), BIAS, MLP_BIAS, EPS,
              [{}, {"no_rope_layer_interval": 2}, {"no_rope_layers": [1, 0, 0, 1, 0]}, {"no_rope_layers": [1, 1, 1, 1, 1]}],
              [{}, {"use_sliding_window": True, "sliding_window": 8}]],
    ),  # fmt: skip
    "seed_oss": dict(
        base={**SMALL, "head_dim": 16},
        axes=[HEADS, HEAD_DIM, ROPES, GATE, TIED, axis("attention_bias", True, False), axis("attention_out_bias", False, True),
              MLP_BIAS, EPS, SIZES],
    ),  # fmt: skip
    "bert": dict(base=ENCODER, axes=ENCODER_AXES, masked=True),
    "roberta": dict(base={**ENCODER, "pad_token_id": 1}, axes=ENCODER_AXES, masked=True),
    "xlm-roberta": dict(base={**ENCODER, "pad_token_id": 1}, axes=ENCODER_AXES, masked=True),
    "camembert": dict(base={**ENCODER, "pad_token_id": 1}, axes=ENCODER_AXES, masked=True),
    "distilbert": dict(
        base=dict(vocab_size=256, dim=64, hidden_dim=128, n_layers=3, n_heads=4, max_position_embeddings=128, pad_token_id=0),
        masked=True,
        axes=[[{}, {"__class": "AutoModel"}], axis("activation", "gelu", "relu"), [{}, {"n_heads": 8}, {"hidden_dim": 96}],
              axis("tie_word_embeddings", True, False), axis("sinusoidal_pos_embds", False, True)],
    ),  # fmt: skip
    "deberta-v2": dict(
        base={**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "share_att_key": True,
              "norm_rel_ebd": "layer_norm", "position_biased_input": False},
        masked=True,
        axes=[[{}, {"__class": "AutoModel"}], PLAIN, TIED[::-1], axis("layer_norm_eps", 1e-7, 1e-3),
              [{}, {"num_attention_heads": 8}, {"hidden_size": 96, "num_attention_heads": 6}, {"intermediate_size": 176}],
              [{}, {"embedding_size": 32}, {"legacy": False}],
              axis("type_vocab_size", 0, 1, 3), axis("position_biased_input", False, True),
              axis("relative_attention", True, False), axis("share_att_key", True, False),
              axis("pos_att_type", ["p2c", "c2p"], "c2p | P2C", ["c2p"], ["p2c"], [], None),
              axis("position_buckets", 16, -1, 0, 2, 7, 40, 256), axis("max_relative_positions", -1, 24, 512),
              axis("norm_rel_ebd", "layer_norm", "none"),
              [{}, {"conv_kernel_size": 3, "conv_act": "gelu"}, {"conv_kernel_size": 5, "conv_groups": 4},
               {"conv_kernel_size": 1, "conv_act": "relu"}, {"conv_kernel_size": 97, "conv_groups": 2}]],
    ),  # fmt: skip
    "modernbert": dict(
        base={**ENCODER, "local_attention": 8, "num_hidden_layers": 4, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2,
              "bos_token_id": 1},
        masked=True,
        axes=[[{}, {"__class": "AutoModel"}], axis("hidden_activation", "gelu", "silu", "gelu_pytorch_tanh"),
              [{}, {"num_attention_heads": 8}, {"intermediate_size": 96}], axis("attention_bias", False, True), MLP_BIAS,
              axis("norm_bias", False, True), axis("decoder_bias", True, False), axis("classifier_bias", False, True),
              axis("classifier_activation", "gelu", "relu"), axis("tie_word_embeddings", True, False),
              axis("local_attention", 8, 16, 64), axis("norm_eps", 1e-5, 1e-3),
              [{}, mixed_layers("sliding", "full", "sliding", "full")]],
    ),  # fmt: skip
}
for name, entry in FAMILIES.items():
    if entry.get("masked"):
        entry.setdefault("class", "AutoModelForMaskedLM")

# What is refused with a message that contains one of these: an effect that gptq names and does not compute.
REFUSED = {
    # The definition that the models were published with obeys these, transformers does not.
    "mpt": ['"no_bias" is false', '"logit_scale" is', '"attn_config.alibi', '"attn_config.qk_ln" is true'],
}
