# Everything a contributor runs. `make` alone lists the targets.

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bench-peers compat quality neon fuzz

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Quantize the real SmolLM2-135M-Instruct to 4 bits, compare with round-to-nearest, generate
	@scripts/demo.sh

test: check ## All that CI runs: format, lints, documentation, tests
	@scripts/test.sh

check: ## The quick part of it: format, lints, documentation
	@cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1 || rustup component add clippy rustfmt
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

bench: ## Speed of loading, prefill and decoding, original and 4-bit (run `make demo` first)
	@scripts/bench.sh

bench-peers: ## The same shapes in gptq, llama.cpp and OpenVINO side by side: compiles llama.cpp, a quarter of an hour
	@scripts/bench-peers.sh

compat: ## Check against the real tools (transformers, GPTQModel, llama.cpp): installs 5 GiB, tens of minutes
	@scripts/compat.sh

quality: ## GPTQModel beside gptq on the same calibration tokens: ARGS="--calibration TEXT --eval TEXT..."
	@scripts/quality.sh $(ARGS)

neon: ## Check the kernels for 64-bit ARM, and run their tests where qemu-aarch64 and a cross compiler are
	@scripts/neon.sh

fuzz: ## Fuzz the readers of untrusted bytes, 20 seconds each (needs `cargo install cargo-fuzz`)
	cd fuzz && for target in safetensors_index gguf gptq_unpack config chat_template; do \
		mkdir -p corpus/$$target && RUSTC_BOOTSTRAP=1 cargo fuzz run $$target \
			corpus/$$target ../testdata/corpus/$$target -- -max_total_time=20 || exit 1; \
	done
