"""Measure what reading a teacher server's answer costs the training process.

    python -m benchmarks.parsing

The body of a `/v1/completions` answer of vLLM is parsed with `json` and with `orjson`, which the
client uses, and its entries are read into arrays. CPU seconds, the least of several calls.
"""

import json
import random
import time
from collections.abc import Callable
from typing import Any

import orjson

from opd.serving.vllm_protocol import read_row

NUM_TOKENS, VOCABULARY, NUM_REPEATS = 500, 50_000, 20


def make_answer(k: int) -> tuple[list[int], dict[str, Any]]:
    """Return the token ids of a sequence, and a server's answer about it."""
    draw = random.Random(0)
    entries: list[Any] = [None]
    for _ in range(NUM_TOKENS):
        ids = draw.sample(range(VOCABULARY), k + 1)
        entries.append(
            {
                str(v): {"logprob": -3.0 - 0.123456789 * r, "rank": r, "decoded_token": f" t{v}"}
                for r, v in enumerate(ids, 1)
            }
        )
    tokens = [0] + [int(next(iter(entry))) for entry in entries[1:]]
    return tokens, {"prompt_token_ids": tokens, "prompt_logprobs": entries}


def microseconds_per_token(function: Callable[[], object]) -> float:
    """Return the least CPU time of several calls."""
    times = []
    for _ in range(NUM_REPEATS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times) / NUM_TOKENS * 1e6


def main() -> None:
    print("| K | bytes per token | json | orjson | reading into arrays |\n|---|---|---|---|---|")
    for k in (16, 64):
        tokens, answer = make_answer(k)
        body = json.dumps(answer).encode()
        positions = range(1, NUM_TOKENS + 1)
        times = [
            microseconds_per_token(lambda body=body: json.loads(body)),  # type: ignore[misc]
            microseconds_per_token(lambda body=body: orjson.loads(body)),  # type: ignore[misc]
            microseconds_per_token(
                lambda t=tokens, a=answer, p=positions, k=k: read_row(a, t, p, k, VOCABULARY)  # type: ignore[misc]
            ),
        ]
        cells = " | ".join(f"{x:.1f} µs" for x in times)
        print(f"| {k} | {len(body) / NUM_TOKENS:,.0f} | {cells} |")


if __name__ == "__main__":
    main()
