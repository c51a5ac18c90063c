"""Writes the conformance fixture of AutoAWQ's packing: `autoawq.py DIR`, where DIR is AutoAWQ's source
(`pip download --no-deps --no-binary :all: autoawq`, unpacked).

AutoAWQ itself does not open in today's transformers; its quantizer and its packing do without: rounding to nearest with its
`pseudo_quantize_tensor`, packed by its `WQLinear_GEMM.from_linear`, unpacked by its `dequantize_gemm`.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
GROUP_SIZE = 32


def stub(name, **members):
    """A module in place of one whose imports are of no use here."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def packages(source):
    for name in ["awq", "awq.modules", "awq.modules.linear", "awq.utils", "awq.quantize"]:
        stub(name, __path__=[str(source / name.replace(".", "/"))])
    stub("awq.utils.utils", get_best_device=lambda: "cpu", clear_memory=None)
    stub("awq.utils.calib_data", get_calib_dataset=None)
    stub("awq.quantize.scale", apply_scale=None, apply_clip=None)


def main():
    packages(Path(sys.argv[1]))
    gemm = importlib.import_module("awq.modules.linear.gemm")
    linears = ["WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_Marlin", "WQLinear_GEMVFast"]
    sys.modules["awq.modules.linear"].__dict__.update(dict.fromkeys(linears))
    packing = importlib.import_module("awq.utils.packing_utils")
    quantizer = importlib.import_module("awq.quantize.quantizer").AwqQuantizer
    settings = types.SimpleNamespace(group_size=GROUP_SIZE, zero_point=True, w_bit=4)

    torch.manual_seed(17)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 * torch.randn_like(parameter, dtype=torch.float32)
            parameter.copy_(1 + spread if "norm" in name else 1.5 * spread)
    tensors = {}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        weight, scales, zeros = quantizer.pseudo_quantize_tensor(settings, linear.weight.data.float())
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
        linear.weight.data = weight.half()
        awq = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP_SIZE, scales=scales, zeros=zeros)
        parts = {part: getattr(awq, part) for part in ["qweight", "qzeros", "scales"]}
        unpacked = packing.dequantize_gemm(*parts.values(), 4, GROUP_SIZE)
        # In f32, as engines' results differ by rounding alone.
        full = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), 4, GROUP_SIZE)
        assert torch.equal(full.half(), unpacked)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        linear.weight.data = full.t().contiguous()
    packed = {key.rsplit(".", 1)[0] for key in tensors}
    for key, tensor in model.state_dict().items():
        if key.rsplit(".", 1)[0] not in packed:
            tensors[key] = tensor.half()
    model = model.float()
    ids = torch.randint(3, 96, (2, 24))
    with torch.no_grad():
        expected = {"input_ids": ids, "logits": model(input_ids=ids).logits}

    directory = ROOT / "testdata" / "fixtures" / "awq" / "b4_g32.gemm"
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, directory / "expected.safetensors")
    told = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    # As `AwqConfig.to_transformers_dict` has it.
    told["quantization_config"] = dict(
        quant_method="awq", zero_point=True, group_size=GROUP_SIZE, bits=4, version="gemm", modules_to_not_convert=None
    )
    (directory / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    print(directory, sum(file.stat().st_size for file in directory.iterdir()), "bytes")


main()
