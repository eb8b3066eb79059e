"""The lab pair: a teacher and a weaker student, made from nothing on a verifiable task.

Two causal language models with one tokenizer, trained by next-token prediction on worked solutions
of `opd.problems`, right ones for the teacher and careless ones for the smaller student, saved as
ordinary Hugging Face folders. Minutes on two CPU cores, one for each model; the same settings give
the same bits on the same machine, and a pair is built only once.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.problems import careless as careless_solution
from opd.problems import problems
from opd.runlog import whole_folder, write_text

if TYPE_CHECKING:
    import torch

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """One model: its size, how long it is taught, and what it learns from.

    careless: probability of a slip in each result of the solutions.
    """

    layers: int
    width: int
    steps: int
    batch: int
    lr: float
    careless: float = 0.0


@dataclass(frozen=True)
class LabConfig:
    """Both models and the seed; the cache is keyed by all of it."""

    teacher: Recipe = Recipe(layers=2, width=128, steps=700, batch=24, lr=3e-3)
    student: Recipe = Recipe(layers=2, width=96, steps=700, batch=24, lr=3e-3, careless=0.06)
    seed: int = 0
    held_out: int = 512


def tiny_config() -> LabConfig:
    """Seconds, for tests and the smoke recipe; neither model can do the task."""
    return LabConfig(
        teacher=Recipe(layers=2, width=32, steps=12, batch=8, lr=2e-3),
        student=Recipe(layers=1, width=32, steps=6, batch=8, lr=2e-3),
        held_out=8,
    )


def build(folder: Path, config: LabConfig, jobs: int = 1) -> tuple[Path, Path]:
    """(student, teacher) folders below `folder`, built if they are not there.

    Raises:
      ValueError: `folder` holds a pair of other settings; names them.
    """
    import joblib

    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    record = folder / "lab.json"
    if record.exists():
        old = json.loads(record.read_text())["settings"]
        changed = [k for k in sorted(settings.keys() | old.keys()) if settings.get(k) != old.get(k)]
        if changed:
            what = ", ".join(f"{k}: {old.get(k)} -> {settings.get(k)}" for k in changed)
            raise ValueError(
                f"{folder} holds a pair of other settings ({what}); choose another --out"
            )
        return folder / "student", folder / "teacher"
    names = ("teacher", "student")
    work = (joblib.delayed(build_one)(folder, config, *cell) for cell in enumerate(names))
    found = dict(zip(names, joblib.Parallel(n_jobs=jobs)(work), strict=True))
    write_text(record, json.dumps({"settings": settings, **found}, indent=1))
    return folder / "student", folder / "teacher"


def build_one(folder: Path, config: LabConfig, offset: int, name: str) -> dict[str, Any]:
    """Teach one model on one thread and save it; returns its held-out accuracy."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    start, threads = time.perf_counter(), torch.get_num_threads()
    # the same sums in the same order, whatever runs beside
    torch.set_num_threads(1)
    try:
        network = teach(getattr(config, name), derive_seed(config.seed, offset), name, offset)
        with whole_folder(folder / name) as part:
            network.save_pretrained(part)
            make_tokenizer().save_pretrained(part)
        found = held_out(folder / name, config.held_out)
    finally:
        torch.set_num_threads(threads)
    found["seconds"] = round(time.perf_counter() - start, 1)
    line = "{accuracy:.3f} [{low:.3f}, {high:.3f}] on {problems} held-out problems, {seconds} s"
    print(f"{name}: accuracy {line.format(**found)}", file=sys.stderr)
    return found


def make_tokenizer() -> Any:
    """One token a byte, and the special tokens, with a chat template.

    A Qwen2Tokenizer, because that is what AutoTokenizer makes of any tokenizer beside a Qwen2
    model: another kind would come back from disk splitting text in another way.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def teach(recipe: Recipe, seed: int, name: str, place: int = 0) -> Any:
    """Next-token prediction on the responses of fresh training problems."""
    import torch
    from tqdm import tqdm

    tokenizer = make_tokenizer()
    network = new_model(recipe, len(tokenizer), seed, tokenizer)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    bar = tqdm(range(recipe.steps), desc=f"teach {name}", position=place, disable=None)
    for step in bar:
        ids, labels = examples(tokenizer, recipe.batch, derive_seed(seed, step), recipe.careless)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe.steps)
        loss = network(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def new_model(recipe: Recipe, vocabulary: int, seed: int, tokenizer: Any) -> Any:
    """A Qwen2 model initialised from `seed`, without touching the caller's random state."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 32,
        num_key_value_heads=recipe.width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def examples(
    tokenizer: Any, count: int, seed: int, careless: float = 0.0
) -> "tuple[torch.Tensor, torch.Tensor]":
    """(B, L) ids and labels of worked problems, padded right; only responses are labelled."""
    import torch

    rows, generator = [], random.Random(seed)
    for problem in problems("train", count, seed):
        message = [{"role": "user", "content": problem.prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        response = careless_solution(problem.prompt, careless, generator) + tokenizer.eos_token
        rows.append([tokenizer.encode(text) for text in (prompt, response)])
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((count, width), tokenizer.pad_token_id)
    labels = torch.full((count, width), -100)
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids, labels


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth, then a half cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def derive_seed(*words: int) -> int:
    from opd.train import derive

    return derive(*words)


def held_out(model: Path, count: int) -> dict[str, Any]:
    """Held-out accuracy of a saved model at temperature 1, with its interval."""
    from opd.evaluate import evaluate_folder

    found = evaluate_folder(
        str(model),
        "lab",
        device="cpu",
        problems=count,
        max_prompt=64,
        max_response=192,
        temperature=1.0,
        seed=0,
    )
    return {k: v for k, v in found.items() if k != "outcomes"}


def main(argv: list[str]) -> None:
    """`opd lab [--out DIR] [--seed N] [--tiny]`."""
    parser = argparse.ArgumentParser(prog="opd lab", description=__doc__)
    parser.add_argument("--out", default=None, help="folder (default: lab, or lab-tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--jobs", type=int, default=2, help="1 builds one after the other")
    given = parser.parse_args(argv)
    config = dataclasses.replace(tiny_config() if given.tiny else LabConfig(), seed=given.seed)
    folder = Path(given.out or ("lab-tiny" if given.tiny else "lab"))
    student, teacher = build(folder, config, given.jobs)
    print(f"student: {student}\nteacher: {teacher}")
