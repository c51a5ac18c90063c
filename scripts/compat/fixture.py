"""Writes a conformance fixture of a family: `fixture.py FAMILY [NAME [CHANGES]]` makes testdata/fixtures/NAME from the
family's entry in families.py with the CHANGES (a JSON object), small (a few ten KiB): config.json as transformers writes it,
the weights, and what transformers computes.
"""

import json
import sys

import torch
from families import FAMILIES
from safetensors.torch import save_file
from variants import ROOT, ask, build, save

SMALLER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=96)


def main():
    family = sys.argv[1]
    directory = ROOT / "testdata" / "fixtures" / (sys.argv[2:] or [family])[0]
    changes = json.loads((sys.argv[3:] or ["{}"])[0])
    smaller = {key: value for key, value in SMALLER.items() if key in FAMILIES[family]["base"]}
    model = build(family, smaller | changes, seed=11)
    inputs, expected = ask(model, FAMILIES[family].get("masked", False), seed=12)
    if "attention_mask" not in inputs:
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        expected |= {f"hidden_states.{index}": state.contiguous() for index, state in enumerate(states)}
    save(family, model, directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    save_file({**inputs, **expected}, directory / "expected.safetensors")
    print(directory, sum(file.stat().st_size for file in directory.iterdir()), "bytes")


main()
