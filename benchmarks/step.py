"""Compare a whole distillation step with TRL's trainer on the same models, prompts and work.

    python -m benchmarks.step [--steps 5 --response 64 --vocabulary 32768 --width 128 --layers 4]

Each trainer runs in its own process, one after the other, on the same random pair: a step samples
one response of exactly `response` tokens to each of `rows` prompts, scores it with the teacher and
takes one AdamW step. The first step is excluded. Memory is the peak of the process beyond its use
before the first step. TRL computes the full-vocabulary reverse KL, as does the toolkit's first row;
the second row is the paper's renormalised top-K, a different objective. In bfloat16 the toolkit
keeps float32 master weights beside bfloat16 ones; TRL keeps float32 weights and computes under
autocast.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.timing import clock_seconds
from opd.config.settings import with_settings

KINDS = ("trl", "full_reverse_kl", "teacher_topk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps({"trl": run_trl}.get(args.kind, run_toolkit)(args)))
        return
    print(
        f"rows {args.rows}, response {args.response}, V {args.vocabulary}, width {args.width}, "
        f"{args.layers} layers, {args.device}; torch {version('torch')}, transformers "
        f"{version('transformers')}, trl {version('trl')}"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), args)
        measurements = {kind: run_trainer(kind, folder, sys.argv[1:]) for kind in KINDS}
    for kind, (seconds, mebibytes) in measurements.items():
        ratio = measurements["trl"][0] / seconds
        print(
            f"{kind:16} {seconds:7.2f} s a step ({ratio:.2f}x), peak {mebibytes:7.0f} MiB beyond "
            f"the start ({measurements['trl'][1] / mebibytes:.2f}x less)"
        )


def run_trainer(kind: str, folder: str, options: list[str]) -> tuple[float, float]:
    """Run a trainer in a new process, with options of this command; return seconds and MiB."""
    line = [sys.executable, "-m", "benchmarks.step", *options]
    line += ["--kind", kind, "--folder", folder]
    quiet = os.environ | {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.run(line, capture_output=True, text=True, env=quiet, check=False)
    if process.returncode:
        raise RuntimeError(f"{kind} failed:\n{process.stderr[-3000:]}")
    result = json.loads(process.stdout.strip().splitlines()[-1])
    return result["seconds"], result["mebibytes"]


def make_models(folder: Path, args: Any) -> None:
    """Save a random pair without an end token, for responses of equal length, and a task file."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from opd.lab.build import make_tokenizer

    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.width // 32,
            num_key_value_heads=args.width // 32,
            max_position_embeddings=args.response + 128,
        )
        network = Qwen2ForCausalLM(config)
        network.generation_config.eos_token_id = args.vocabulary - 1  # of probability 1 / V
        network.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{i}+{i}*{i}", "answer": "0"} for i in range(10, 10 + 64 * args.rows)]
    (folder / "task.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def peak_memory() -> float:
    """Return the peak resident memory of the process in MiB; on CUDA that allocated by torch."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summarize_times(ends: list[float], start_memory: float) -> dict[str, float]:
    """Return median seconds per step and peak memory beyond the start."""
    between = [b - a for a, b in pairwise(ends)]
    return {
        "seconds": sorted(between)[len(between) // 2],
        "mebibytes": peak_memory() - start_memory,
    }


def run_toolkit(args: Any) -> dict[str, float]:
    """Time the toolkit's step with its metrics, without evaluations."""
    from opd.config.settings import Config
    from opd.training import train as trainer

    config = with_settings(
        Config(
            student=str(args.folder / "student"),
            teacher=str(args.folder / "teacher"),
            out=str(args.folder / f"run-{args.kind}"),
            steps=args.steps + 1,
        ),
        task=str(args.folder / "task.jsonl"),
        objective=args.kind,
        support_k=32,
        prompts_per_step=args.rows,
        group_size=1,
        max_response=args.response,
        lr=1e-6,
        eval_every=0,
        save_every=0,
        save_batch_every=0,
        device=args.device,
        dtype=args.dtype,
    )
    ends: list[float] = []
    memory_at_start: list[float] = []
    step = trainer.run_step

    def timed(state: Any, number: int, log: Any) -> Any:
        memory_at_start.append(peak_memory())
        row = step(state, number, log)
        ends.append(clock_seconds(args.device))
        return row

    trainer.run_step = timed  # type: ignore[assignment]
    trainer.evaluate_and_record = lambda *_: None  # type: ignore[assignment]
    trainer.checkpoint.save = lambda *_: None  # type: ignore[assignment]
    trainer.train(config)
    return summarize_times(ends, memory_at_start[0])


def run_trl(args: Any) -> dict[str, float]:
    """Time TRL's DistillationTrainer at beta = 1."""
    import pandas
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    ends: list[float] = []
    memory_at_start: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            memory_at_start.append(peak_memory())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock_seconds(args.device))

    rows = pandas.read_json(args.folder / "task.jsonl", lines=True)
    prompts = [[{"role": "user", "content": text}] for text in rows["prompt"]]
    cpu = args.device == "cpu"
    config = DistillationConfig(
        output_dir=str(args.folder / "trl"),
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=args.response,
        per_device_train_batch_size=args.rows,
        max_steps=args.steps + 1,
        learning_rate=1e-6,
        use_cpu=cpu,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        # its generation also stops at the tokenizer's EOS, which is prevented here
        generation_kwargs={"min_new_tokens": args.response},
    )
    trainer = DistillationTrainer(
        model=str(args.folder / "student"),
        teacher_model=str(args.folder / "teacher"),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(args.folder / "student"),
        callbacks=[Clock()],
    )
    torch.manual_seed(0)
    trainer.train()
    return summarize_times(ends, memory_at_start[0])


if __name__ == "__main__":
    main()
