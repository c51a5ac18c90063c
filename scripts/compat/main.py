"""Runs the parts of `make compat`, writes their sections of docs/reference/compat.md and fails if any row does."""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import platform
import sys
import warnings

from tools import EXACT_TOLERANCE, KERNEL_TOLERANCE, ROOT, WORK, gptq

PARTS = {
    "ours_in_transformers": (
        "What gptq writes, in transformers",
        "A random two-block Llama with biases is quantized by `gptq quantize` and opened by "
        "`AutoModelForCausalLM.from_pretrained` on CPU. A row stands for several checkpoints and shows the largest "
        "difference: 9 are group 32 left to right, with GAR, with desc_act and with desc_act and static groups; group "
        "128 the same less static groups; group -1 (the whole row) left to right and with desc_act. 3 are group 32 with "
        "GAR and with desc_act, and group -1.\n\n"
        "GPTQModel 7.7.0 chooses for 4 bits with group -1 on CPU a kernel (TorchFusedLinear) that ignores zero points: "
        "asymmetric checkpoints, its own too, give wrong numbers there unless opened with "
        "`GPTQConfig(bits=4, backend=\"torch\")`, which is what is done here.",
    ),
    "ours_in_gptqmodel": (
        "What gptq writes, in GPTQModel",
        "The same model, opened by `GPTQModel.load`, which reads overrides for single modules (transformers raises a "
        "size mismatch). It refuses asymmetric `gptq` (v1) of any tool but itself; such a checkpoint opens in "
        "transformers, and here as `gptq_v2` (`gptq quantize --format gptq_v2`, or `gptq convert --to gptq_v2`).",
    ),
    "every_family": (
        "Every family, both ways",
        "A random tiny model of each family is quantized by `gptq quantize` and by GPTQModel (4 bits, symmetric, groups of 32) "
        "and opened by the tools. **Modules** are the quantized ones, which have to be the same on both sides, with the same "
        "weights to the bit; then the numbers are differences of logits in f32 arithmetic. **Reload equal** compares with "
        "`gptq convert --to hf` in transformers, whose weights are rounded to f16. A family is ok if ours opens wherever "
        "GPTQModel's own checkpoint does and gptq opens that one; what a tool does not open is explained below the table, "
        "with the tool's message. Encoders have their masked-language head.",
    ),
    "ours_in_transformers_4": (
        "Every family, in transformers 4",
        "The same checkpoints opened by transformers 4.57.3 with optimum 1.27.0 and GPTQModel 5.7.0: differences of logits in "
        "f32 arithmetic. Mixtures of experts, GPT-2's Conv1D and Falcon open here and not in transformers 5. ModernBERT "
        "opens in neither version: transformers initialises the weights of its linears, which GPTQModel's do not have.",
    ),
    "theirs_in_ours": (
        "What GPTQModel writes, in gptq",
        "The same model is quantized by GPTQModel on CPU and opened by both.",
    ),
    "gguf_in_llama_cpp": (
        "What gptq exports to GGUF, in llama.cpp",
        "SmolLM2-135M-Instruct quantized by `gptq quantize`, exported by `gptq convert --to gguf`, and run by llama.cpp "
        "on the same windows of text; weights are read by the `gguf` package. llama.cpp rounds activations to 8 bits "
        "per 32 values, gptq does not, so 0.5 % are allowed; the first row, a file that gptq did not write, has more. "
        "Calibration is 4 windows of 128 tokens, so the perplexities say nothing about quality.",
    ),
}

F16_TOLERANCE, BF16_TOLERANCE = KERNEL_TOLERANCE.values()
PREAMBLE = f"""# Compatibility, measured

Written by `make compat`, which installs the tools named below and takes tens of minutes. Do not edit.

**Weights bit-equal**: the other tool's own dequantization, rounded to f16, equals `gptq convert --to hf` in every bit.
**Logits** are differences from `gptq logits`, relative to the largest logit: in f32 arithmetic with the other tool's
dequantized weights (at most {EXACT_TOLERANCE:.0e}), and by the other tool's kernel, whose activations are rounded to f16
or bf16 after every operation (at most {F16_TOLERANCE:.0e} and {BF16_TOLERANCE:.0e}).
"""

REPORT = ROOT / "docs" / "reference" / "compat.md"
TOOLS = ["torch", "transformers", "optimum", "gptqmodel", "gguf", "llama-cpp-python", "safetensors", "numpy"]


def versions():
    def version(tool):
        try:
            return importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    found = ", ".join(f"{tool} {version(tool)}" for tool in TOOLS)
    return f"{gptq('--version').strip()}; Python {platform.python_version()}, {found}; {platform.machine()}."


def part(name):
    """The section of one part, and whether all its rows hold."""
    title, about = PARTS[name]
    lines = ["", f"## {title}", "", about, ""]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        print(f"SKIPPED: {title}: {error}", file=sys.stderr)
        return [*lines, f"SKIPPED: {error}"], True
    lines += [f"| {' | '.join([*module.HEAD, 'verdict'])} |", "|---" * (len(module.HEAD) + 1) + "|"]
    holds, failures = True, []
    rows = module.rows()
    while True:
        with contextlib.redirect_stdout(io.StringIO()):  # the tools print their logs here
            row = next(rows, None)
        if row is None:
            break
        lines.append(f"| {' | '.join([row.setting, *row.found, 'ok' if row.ok else 'FAILS'])} |")
        print(lines[-1], *row.failures, sep="\n    ", flush=True)
        failures += [f"- {row.setting}: {failure}" for failure in row.failures]
        holds &= row.ok
    return [*lines, *([""] if failures else []), *failures], holds


def main():
    os.chdir(WORK)  # GPTQModel writes its logs to the current directory
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sections, holds = {}, True
    for name in sys.argv[1:] or PARTS:
        section, ok = part(name)
        sections[name], holds = "\n".join(section), holds and ok
    if sys.argv[1:]:
        sections = written() | sections
    if versions() in (REPORT.read_text() if sys.argv[1:] else versions()):
        parts = [sections[name] for name in PARTS if name in sections]
        REPORT.write_text("\n".join([PREAMBLE, versions(), *parts]) + "\n")
    else:
        print(f"{REPORT} is of other versions and stays as it is", file=sys.stderr)
    return 0 if holds else 1


def written():
    """The sections of the report as it is."""
    _, *found = REPORT.read_text().rstrip("\n").split("\n## ")
    titles = {title: name for name, (title, _) in PARTS.items()}
    by_title = {section.split("\n", 1)[0]: f"\n## {section}".rstrip("\n") for section in found}
    return {titles[title]: section for title, section in by_title.items() if title in titles}


sys.exit(main())
