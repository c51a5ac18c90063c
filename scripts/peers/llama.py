"""One run of llama.cpp: prefill, decoding and decoding of parallel sequences. Prints JSON.

Flash attention as llama.cpp chooses it, keys and values in f16, greedy tokens are not computed: only
the forward passes are timed.
"""

import argparse
import ctypes
import json
import statistics
import time

import llama_cpp as L


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()

    silent = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(args.model.encode(), L.llama_model_default_params())
    params = L.llama_context_default_params()
    params.n_ctx = max(args.prompt + args.new + 8, args.batch * (64 + args.new)) + 64
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = args.threads
    params.n_seq_max = args.batch
    params.kv_unified = True
    context = L.llama_init_from_model(model, params)
    memory = L.llama_get_memory(context)
    batch = L.llama_batch_init(512, 0, args.batch)

    def decode(entries: list[tuple[int, int, int]]) -> float:
        """Runs (token, position, sequence) entries; seconds. The last entry of each sequence has logits."""
        last = {sequence: index for index, (_, _, sequence) in enumerate(entries)}
        batch.n_tokens = len(entries)
        for index, (token, position, sequence) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = last[sequence] == index
        start = time.perf_counter()
        if L.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        L.llama_synchronize(context)
        return time.perf_counter() - start

    token = lambda i: (i * 7919 + 11) % 32000  # noqa: E731
    prompt = [(token(i), i, 0) for i in range(args.prompt)]
    decode(prompt[:8])
    L.llama_memory_clear(memory, True)
    prefill = sum(decode(prompt[first : first + 512]) for first in range(0, args.prompt, 512))
    steps = [decode([(token(i), args.prompt + i, 0)]) for i in range(args.new)]
    L.llama_memory_clear(memory, True)
    for sequence in range(args.batch):
        decode([(token(i + sequence), i, sequence) for i in range(64)])
    many = [decode([(token(i + s), 64 + i, s) for s in range(args.batch)]) for i in range(args.new)]
    print(json.dumps({
        "prefill": args.prompt / prefill,
        "decode": 1 / statistics.median(steps),
        "batch": args.batch / statistics.median(many),
    }))


main()
