"""Compare a training step and its phases with the bare matrix products that it cannot do without.

    python -m benchmarks.floor [--vocabulary 32768 --width 128 --layers 4 --rows 8 --response 64]
    python -m benchmarks.floor --growth [--responses 32 64 128 --vocabularies 8192 32768 65536]

A random Qwen2 pair without an end token. Each trainer runs in a process of its own; after each of
its steps the same process runs the step's floor (`benchmarks.floor.products`), so that other load
on the machine affects both. `--rounds` repeats all trainers in turn. On a CPU times are CPU seconds
of the process with `--threads` threads. A phase of ours divides into rollout, score (both models,
with the statistics of the diagnostics), update, and record (panel, alarms and row), whose floor is
nothing. The ratio is the median over steps of a step and the floor after it. Memory is the peak of
the first steps beyond the start of the process's training, before the floor takes any.

In bfloat16 the toolkit keeps float32 master weights beside bfloat16 ones; TRL keeps float32 weights
and computes under autocast.

TRL's DistillationTrainer at beta = 1 and GKDTrainer at lmbda = 1 and beta = 1 compute the reverse
KL on the whole vocabulary, as `full_reverse_kl` does; `teacher_topk` is another objective, on the
teacher's K most probable ids, renormalised.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.floor.processes import run_process, start_process
from benchmarks.floor.report import comparison_table, growth_tables
from benchmarks.floor.trainers import TRAINERS, Size
from benchmarks.random_pair import save_pair


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trainers", nargs="+", choices=[*TRAINERS], default=[*TRAINERS])
    parser.add_argument("--growth", action="store_true", help="fit lines in T and V")
    parser.add_argument("--responses", type=int, nargs="+", default=[32, 64, 128, 192])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 65536, 98304])
    parser.add_argument("--json", type=Path, help="file of all measurements")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.process:
        run_process(*args.process)
        return
    print(
        f"rows {args.rows}, response {args.response}, V {args.vocabulary}, width {args.width}, "
        f"{args.layers} layers, {args.dtype}, {args.device}, {args.threads} threads; torch "
        f"{version('torch')}, transformers {version('transformers')}, trl {version('trl')}\n"
    )
    if args.growth:
        result: Any = {
            "response": [(t, measure(args, response=t)) for t in args.responses],
            "vocabulary": [(v, measure(args, vocabulary=v)) for v in args.vocabularies],
        }
        print(growth_tables(result, args.rows))
    else:
        result = measure(args)
        print(comparison_table(result))
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "result": result}, default=str))


def measure(args: Any, **changes: int) -> dict[str, dict[str, Any]]:
    """Return the timed steps and the peak memory of every trainer, of all rounds."""
    args = argparse.Namespace(**vars(args) | changes)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = ("vocabulary", "width", "layers", "rows", "response")
        save_pair(Path(folder), **{name: vars(args)[name] for name in names})
        size = Size(
            Path(folder), args.rows, args.response, args.k, args.dtype, args.device, args.steps
        )
        for _ in range(args.rounds):
            for name in args.trainers:
                part = start_process(name, size, args.threads)
                whole = results.setdefault(name, {"steps": [], "mebibytes": 0.0})
                whole["steps"] += part["steps"]
                whole["mebibytes"] = max(whole["mebibytes"], part["mebibytes"])
    return results


if __name__ == "__main__":
    main()
