"""A whole step of on-policy distillation against TRL's trainer: the same models, prompts and work.

    python -m benchmarks.step [--steps 5 --response 64 --vocabulary 32768 --width 128 --layers 4]

Each trainer runs in a process of its own, one after the other, on the same random pair: a step
samples one response of exactly `response` tokens to each of `rows` prompts, scores it with the
teacher and takes one AdamW step. The first step is left out. Memory is the peak of the process
beyond what it held before its first step. TRL computes the full-vocabulary reverse KL; so does our
first row, the second is the paper's renormalised top-K, which is another objective.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kind:
        print(json.dumps({"trl": rival}.get(given.kind, ours)(given)))
        return
    print(
        f"rows {given.rows}, response {given.response}, V {given.vocabulary}, width {given.width}, "
        f"{given.layers} layers, {given.device}; torch {version('torch')}, transformers "
        f"{version('transformers')}, trl {version('trl')}"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), given)
        found = {kind: measured(kind, folder) for kind in KINDS}
    for kind, (seconds, mebibytes) in found.items():
        ratio = found["trl"][0] / seconds
        print(
            f"{kind:16} {seconds:7.2f} s a step ({ratio:.2f}x), peak {mebibytes:7.0f} MiB beyond "
            f"the start ({found['trl'][1] / mebibytes:.2f}x less)"
        )


def measured(kind: str, folder: str) -> tuple[float, float]:
    """(seconds a step, MiB) of a trainer in a fresh process."""
    line = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]]
    line += ["--kind", kind, "--folder", folder]
    quiet = os.environ | {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(line, capture_output=True, text=True, env=quiet, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["seconds"], found["mebibytes"]


def make_models(folder: Path, given: Any) -> None:
    """A random pair with no end token, so that all responses have one length, and a task file."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from opd.lab.build import make_tokenizer

    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=given.vocabulary,
            hidden_size=given.width,
            intermediate_size=4 * given.width,
            num_hidden_layers=given.layers,
            num_attention_heads=given.width // 32,
            num_key_value_heads=given.width // 32,
            max_position_embeddings=given.response + 128,
        )
        network = Qwen2ForCausalLM(config)
        network.generation_config.eos_token_id = given.vocabulary - 1  # of probability 1 / V
        network.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{i}+{i}*{i}", "answer": "0"} for i in range(10, 10 + 64 * given.rows)]
    (folder / "task.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def resident() -> float:
    """MiB that the process has held at most so far; on CUDA what torch has allocated at most."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now(device: str) -> float:
    """Seconds; on a CPU those of this process, whatever else the machine does."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def summary(ends: list[float], before: float) -> dict[str, float]:
    between = [b - a for a, b in pairwise(ends)]
    return {"seconds": sorted(between)[len(between) // 2], "mebibytes": resident() - before}


def ours(given: Any) -> dict[str, float]:
    """Our step, with its diagnostics, without the evaluations around it."""
    from opd.config.settings import Config
    from opd.training import train as trainer

    config = Config(
        student=str(given.folder / "student"),
        teacher=str(given.folder / "teacher"),
        out=str(given.folder / f"run-{given.kind}"),
        task=str(given.folder / "task.jsonl"),
        objective=given.kind,
        support_k=32,
        prompts_per_step=given.rows,
        group_size=1,
        max_response=given.response,
        steps=given.steps + 1,
        lr=1e-6,
        eval_every=0,
        save_every=0,
        save_batch_every=0,
        device=given.device,
    )
    ends: list[float] = []
    held: list[float] = []
    step = trainer.one_step

    def timed(run: Any, number: int) -> Any:
        held.append(resident())
        row = step(run, number)
        ends.append(now(given.device))
        return row

    trainer.one_step = timed  # type: ignore[assignment]
    trainer.record_evaluation = lambda *_: None  # type: ignore[assignment]
    trainer.checkpoint.save = lambda *_: None  # type: ignore[assignment]
    trainer.train(config)
    return summary(ends, held[0])


def rival(given: Any) -> dict[str, float]:
    """TRL's DistillationTrainer at beta = 1."""
    import pandas
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    ends: list[float] = []
    held: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            held.append(resident())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now(given.device))

    rows = pandas.read_json(given.folder / "task.jsonl", lines=True)
    prompts = [[{"role": "user", "content": text}] for text in rows["prompt"]]
    cpu = given.device == "cpu"
    config = DistillationConfig(
        output_dir=str(given.folder / "trl"),
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=given.response,
        per_device_train_batch_size=given.rows,
        max_steps=given.steps + 1,
        learning_rate=1e-6,
        use_cpu=cpu,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        # its generation stops at the tokenizer's end, too: none of V
        generation_kwargs={"min_new_tokens": given.response},
    )
    trainer = DistillationTrainer(
        model=str(given.folder / "student"),
        teacher_model=str(given.folder / "teacher"),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(given.folder / "student"),
        callbacks=[Clock()],
    )
    torch.manual_seed(0)
    trainer.train()
    return summary(ends, held[0])


if __name__ == "__main__":
    main()
