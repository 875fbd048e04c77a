"""SmolLM2 in our Transformer and in `transformers`, on the same weights: how fast each writes, and in how much memory.

    make bench        # or: python benchmarks/pretrained.py --tokens 64 --rounds 9

Each runs in a process of its own, fp32, batch 1, greedy; they take turns, so that a busy machine slows both. Ours is
as `llm-scratch chat` has it: the class of lesson 3.6, its matrices laid out for writing (`interop.layout`). Not a test:
figures of time belong to one machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

PROMPT = (
    "<|im_start|>user\nWrite a story about the sea, as long as you can.<|im_end|>\n<|im_start|>assistant\n"
)


def ours(n: int) -> Callable[[], list[int]]:
    """A function that writes `n` tokens with our model."""
    from tutorial_lib.interop.pretrained import open_pretrained
    from tutorial_lib.serve.respond import Request, complete

    found = open_pretrained("smollm2", to_write=True)
    request = Request(found.tokenizer.encode(PROMPT, allow_specials=True), n, temperature=0)
    return lambda: complete(found.model, found.tokenizer, [request])[0].ids


def theirs(n: int) -> Callable[[], list[int]]:
    """The same with theirs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutorial_lib.data.corpora import fetch

    path = fetch("smollm2")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    given = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    how = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda: model.generate(**given, **how)[0, given["input_ids"].shape[1] :].tolist()


def work(side: str, n: int, threads: int) -> None:
    """A process of one side: it writes whenever its parent says a line, and says how long that took."""
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    write = {"ours": ours, "theirs": theirs}[side](n)
    print(json.dumps({"load": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        ids = write()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"seconds": seconds, "ids": ids, "peak": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work, arguments.tokens, arguments.threads)

    workers, rows = {}, {"ours": [], "theirs": []}
    for side in rows:  # one after the other: loading is not to disturb the other's
        command = [sys.executable, __file__, "--work", side]
        command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        workers[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        loaded = json.loads(workers[side].stdout.readline())
        print(f"{side:<7} loaded in {loaded['load']:.1f} s", flush=True)
    for number in range(arguments.rounds + 1):
        for side, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            row = json.loads(worker.stdout.readline())
            if number:  # the first round warms up
                rows[side].append(row)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    n = arguments.tokens
    for side, found in rows.items():
        speed = statistics.median(n / row["seconds"] for row in found)
        print(f"{side:<7} {speed:6.1f} tokens/s (median), peak memory {found[-1]['peak'] / 2**20:,.0f} MiB")
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(rows["ours"], rows["theirs"], strict=True)]
    least = rows["ours"][-1]["peak"] / rows["theirs"][-1]["peak"]
    print(f"ours is {statistics.median(ratios):.2f}× as fast (median of {len(ratios)}, ", end="")
    print(f"{min(ratios):.2f} to {max(ratios):.2f}), in {least:.2f}× the memory")
    same = sum(o["ids"] == t["ids"] for o, t in zip(rows["ours"], rows["theirs"], strict=True))
    print(f"the same {n} tokens in {same} of {len(ratios)} rounds")
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, fp32, batch 1")


if __name__ == "__main__":
    main()
