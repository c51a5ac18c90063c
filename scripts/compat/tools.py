"""What the parts of `make compat` share: the gptq binary, tiny models, comparisons and the table."""

import os
import pathlib
import subprocess
from dataclasses import dataclass

import torch
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = pathlib.Path(os.environ.get("GPTQ_COMPAT_WORK", ROOT / ".demo" / "compat"))
WORK.mkdir(parents=True, exist_ok=True)
GPTQ = pathlib.Path(os.environ.get("GPTQ_BINARY", ROOT / "target" / "release" / "gptq")).resolve()


# Relative to the largest logit. Kernels: f16 rounds activations to 2^-11, bf16 to 2^-8, many times over two blocks.
KERNEL_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 8e-2}
EXACT_TOLERANCE = 2e-5


@dataclass
class Row:
    """One line of a table: what was tried, what was found, and whether that is good enough."""

    setting: str
    found: list[str]
    ok: bool
    failures: list[str]


def gptq(*arguments):
    """Runs our binary and returns its stdout; its message is the error."""
    command = [str(GPTQ), *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"gptq {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def tokens():
    """Token ids [2, 24] that every comparison of logits uses."""
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def our_logits(model):
    """Logits [2, 24, vocab] of `tokens()` as `gptq logits` gives them, f32."""
    asked, answered = WORK / "tokens.safetensors", WORK / "logits.safetensors"
    save_file({"input_ids": tokens()}, asked)
    gptq("logits", model, "--input", asked, "--output", answered)
    return load_file(answered)["logits"]


def our_weights(model):
    """Every tensor of a checkpoint after `gptq convert --to hf`: quantized weights as f16 [out, in]."""
    output = WORK / "dequantized"
    gptq("convert", model, "--to", "hf", "--output", output, "--overwrite")
    return load_file(output / "model.safetensors")


def difference(ours, theirs):
    """Largest difference, relative to the largest value."""
    return ((ours - theirs.float()).abs().max() / ours.abs().max()).item()


def compare_exactly(model, quantized, source):
    """Compares a model loaded with GPTQModel's plain torch kernel with what we make of the same checkpoint.

    Returns whether its dequantized weights, rounded to f16 as `gptq convert --to hf` writes them, are ours to the bit,
    and the difference of our logits from those of a plain f32 Llama with these weights.
    """
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    assert len(linears) == 14, f"{len(linears)} of 14 linears are quantized"
    # AWQ's scales are folded into norms.
    exact = {name: tensor.float() for name, tensor in model.named_parameters()}
    for name, linear in linears.items():
        linear.scales = linear.scales.float()  # else the product is rounded to f16
        exact[f"{name}.weight"] = dequantized(linear).T.contiguous()
        exact[f"{name}.bias"] = linear.bias.float()
    ours = our_weights(quantized)
    equal = all(torch.equal(ours[name], tensor.half()) for name, tensor in exact.items())
    reference = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference.load_state_dict(exact, strict=False)
    with torch.no_grad():
        return equal, difference(our_logits(quantized), reference(tokens()).logits)


def dequantized(linear):
    """The weight [in, out] of one of GPTQModel's quantized linears, in f32."""
    if hasattr(linear, "dequantize_weight"):
        return linear.dequantize_weight()
    packed = {name: getattr(linear, name) for name in ("qweight", "qzeros", "scales", "bits", "group_size")}
    return dequantize_gemm(**packed)


def row(setting, check, *arguments):
    """The row of one checkpoint; `check` returns (weights equal, f32 difference, kernel difference)."""
    try:
        equal, exact, kernel = check(*arguments)
    except Exception as error:  # whatever a tool raises is a finding, and the other settings go on
        return Row(setting, ["no", "", "", ""], False, [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"])
    ok = equal and exact <= EXACT_TOLERANCE and kernel <= KERNEL_TOLERANCE[torch.float16]
    return Row(setting, ["yes", "yes" if equal else "no", f"{exact:.1e}", f"{kernel:.1e}"], ok, [])


def tiny_llama(dtype):
    """Writes a random two-block Llama with biases, and a tokenizer of single bytes; returns its directory."""
    directory = WORK / f"tiny-{str(dtype).removeprefix('torch.')}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, attention_bias=True, mlp_bias=True, initializer_range=0.15,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    # All-positive and all-negative groups: their asymmetric zero points are the ends of the range.
    for block in model.model.layers:
        for linear in (block.self_attn.q_proj, block.mlp.down_proj):
            linear.weight.data[:8, :32] = linear.weight.data[:8, :32].abs()
            linear.weight.data[8:16, :32] = -linear.weight.data[8:16, :32].abs()
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer(directory)
    return directory


def byte_tokenizer(directory):
    """Writes a tokenizer of 256 single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={symbol: code for code, symbol in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=alphabet[1]).save_pretrained(directory)
