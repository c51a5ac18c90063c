#!/usr/bin/env sh
# GPTQModel and gptq on the same model and the same calibration tokens: perplexity, divergence, time and memory. In the venv
# of scripts/compat.sh. Arguments go to scripts/compat/quality.py (see --help there):
#     scripts/quality.sh --calibration wikitext2-valid.txt --eval wikitext2-test.txt tinyshakespeare.txt
set -eu
COMPAT_SCRIPT=quality.py exec "$(dirname "$0")/compat.sh" "$@"
