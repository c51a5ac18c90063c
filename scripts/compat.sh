#!/usr/bin/env sh
# Checks gptq against the real tools: transformers with GPTQModel, and llama.cpp. Installs them into .demo/compat-venv
# (5 GiB, and llama.cpp is compiled), so it takes tens of minutes and is not part of `make test`.
# Arguments name the parts to run, all by default; their sections of docs/reference/compat.md are written anew, if the tools
# are of the versions that it names. GPTQ_COMPAT_WORK is where checkpoints are made, .demo/compat by default.
set -eu
cd "$(dirname "$0")/.."

venv=.demo/compat-venv
requirements=scripts/compat/requirements.txt
# gptqmodel would otherwise look for a CUDA toolkit.
export BUILD_CUDA_EXT=0 CUDA_VISIBLE_DEVICES=
# On two cores GPTQModel 7.7.0 asks for one worker, and then for two of it.
export GPTQMODEL_CPU_WORKERS=2
# torch.compile takes half a minute per checkpoint and changes no result that is checked here.
export TORCHDYNAMO_DISABLE=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

if ! cmp -s "$requirements" "$venv/installed.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --requirement "$requirements"
    cp "$requirements" "$venv/installed.txt"
fi
older=scripts/compat/requirements-4.txt
if ! cmp -s "$older" "$venv/transformers-4/installed.txt"; then
    rm -rf "$venv/transformers-4"
    "$venv/bin/pip" install --quiet --no-deps --no-build-isolation --target "$venv/transformers-4" --requirement "$older"
    cp "$older" "$venv/transformers-4/installed.txt"
fi
# Compiled from source; the other parts do not need it.
if ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" "$venv/bin/pip" install --quiet llama-cpp-python==0.3.36 ||
        echo "SKIPPED: llama.cpp could not be built; its part will be skipped" >&2
fi

if [ -z "${GPTQ_BINARY:-}" ]; then
    cargo build --release --quiet --locked
fi
exec "$venv/bin/python" "scripts/compat/${COMPAT_SCRIPT:-main.py}" "$@"
