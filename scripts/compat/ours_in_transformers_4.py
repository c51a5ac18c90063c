"""What `gptq quantize` writes of a tiny model of every family, in transformers 4 with the GPTQModel of its time, which open
families that transformers 5 does not: experts are modules there, and weights that are read are not initialised before."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from tools import WORK, Row, gptq

HEAD = ["family", "modules", "logits, f32 arithmetic"]
# Its initialisation reads `weight` of linears, which GPTQModel's do not have, in either version.
NOT_OPENED = ["modernbert"]


def rows():
    older = pathlib.Path(sys.prefix) / "transformers-4"
    environment = {**os.environ, "PYTHONPATH": str(older)}
    process = subprocess.Popen([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if not line.startswith("{"):
            continue  # the tools print their logs
        answer = json.loads(line)
        ok = not answer["message"] or answer["family"] in NOT_OPENED
        yield Row(answer["family"], [str(answer["modules"]), answer["found"]], ok, [answer["message"]] if answer["message"] else [])
    if process.wait() != 0:
        raise RuntimeError("transformers 4 could not be run")


def check(model_type, texts):
    """Number of quantized modules, and the difference of the logits or why there is none."""
    import every_family

    source, quantized = WORK / "transformers-4", WORK / "transformers-4-quantized"
    shutil.rmtree(source, ignore_errors=True)
    every_family.build(model_type, every_family.WIDER.get(model_type, {}), 0).half().save_pretrained(source)
    every_family.byte_tokenizer(source)
    gptq("quantize", source, "--output", quantized, "--overwrite", "--calibration", texts, *every_family.OPTIONS)
    found, message = every_family.attempt(every_family.opened, "transformers", model_type, quantized)
    return {"modules": len(every_family.quantized_modules(quantized)), "found": found, "message": message}


if __name__ == "__main__":
    import every_family

    os.chdir(WORK)
    for family in every_family.FAMILIES:
        if family not in every_family.NAMES_ONLY:
            try:
                answer = check(family, every_family.calibration())
            except Exception as error:  # ours, or transformers without any quantization
                answer = {"modules": "", "found": "no", "message": every_family.first_line(error)}
            print(json.dumps({"family": family, **answer}), flush=True)
