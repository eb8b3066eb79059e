"""The lab: teachers and a weaker student, made from nothing on verifiable tasks.

Causal language models with one tokenizer, trained by next-token prediction on worked solutions of
`opd.data.chain_task` and `opd.data.sort_task`, or on turns of games of `opd.lab.household_demos`, right ones for a teacher and
careless ones for the smaller student, saved as ordinary Hugging Face folders. Minutes on two CPU
cores, one for each model; the same settings give the same bits on the same machine, and a lab is
built only once.

The default lab is a teacher and a student that write alike. The `strangers` lab has what goes wrong
in practice, on purpose: a student of two tasks that spells its tags and ends with <|im_end|>, a
teacher of the first task whose tags are special tokens and whose end is <|endoftext|>, a teacher of
the second that writes as the student does, and loops that all of them have seen.
"""

import dataclasses
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from opd.data import chain_task, sort_task
from opd.lab import household_demos
from opd.lab.writing_style import PLAIN, UNLABELLED, WritingStyle, written
from opd.runtime.seeds import derive
from opd.runtime.staged_folders import whole_folder

if TYPE_CHECKING:
    import torch

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ToyModelConfig:
    """One model: its size, how long it is taught, and what it learns from.

    careless: probability of a slip in each result of the solutions; tasks: names in TASKS, equally
    often, and twice as often where named twice; habit: how it writes.
    """

    layers: int
    width: int
    steps: int
    batch: int
    lr: float
    careless: float = 0.0
    tasks: tuple[str, ...] = ("chain",)
    habit: WritingStyle = PLAIN


TASKS = {"chain": chain_task, "sort": sort_task, "household": household_demos}
"""Modules with `problems(split, count, seed)` and `careless(prompt, rate, generator)`."""
WORDS = 512
"""Entries of the vocabulary of a lab with games, whose prompts are long in bytes."""


@dataclass(frozen=True)
class LabConfig:
    """The models and the seed; the cache is keyed by all of it.

    others: teachers of further tasks, each with the name of its folder.
    """

    teacher: ToyModelConfig = ToyModelConfig(layers=2, width=128, steps=700, batch=24, lr=3e-3)
    student: ToyModelConfig = ToyModelConfig(
        layers=2, width=96, steps=700, batch=24, lr=3e-3, careless=0.06
    )
    others: tuple[tuple[str, ToyModelConfig], ...] = ()
    seed: int = 0
    held_out: int = 512

    @property
    def models(self) -> dict[str, ToyModelConfig]:
        """Folder name to recipe."""
        return {"teacher": self.teacher, "student": self.student, **dict(self.others)}

    @property
    def texts(self) -> list[str]:
        """What the words of the vocabulary are learned from: games, if any model plays them."""
        if not any("household" in recipe.tasks for recipe in self.models.values()):
            return []
        some = household_demos.problems("train", 400, seed=0)
        return [re.sub(r"</?think>", "\n", f"{p.prompt}\n{p.solution}") for p in some]


def mismatched_config() -> LabConfig:
    """Models that write in different ways, with two tasks and a teacher for each."""
    spelled = WritingStyle(tag="spelled", loops=0.01, foreign=0.02)
    read = WritingStyle(end="<|endoftext|>", read=0.5, loops=0.002)
    teacher = ToyModelConfig(layers=2, width=128, steps=1200, batch=24, lr=3e-3, habit=read)
    student = ToyModelConfig(
        layers=2,
        width=96,
        steps=1200,
        batch=24,
        lr=3e-3,
        careless=0.06,
        tasks=("chain", "sort"),
        habit=spelled,
    )
    alike = dataclasses.replace(spelled, loops=0.002)
    sort = dataclasses.replace(student, careless=0.0, tasks=("sort",), habit=alike)
    return LabConfig(teacher=teacher, student=student, others=(("sort-teacher", sort),))


def household_config() -> LabConfig:
    """An agent that plays a household in text, `env:household`, and sorts digits; a teacher of each.

    The student learned from those who misjudge one action, and one digit, in ten.
    """
    teacher = ToyModelConfig(
        layers=2, width=96, steps=1500, batch=32, lr=4e-3, tasks=("household",)
    )
    both = ("household", "household", "sort")
    student = dataclasses.replace(teacher, batch=48, careless=0.1, tasks=both)
    sort = dataclasses.replace(teacher, steps=700, tasks=("sort",))
    return LabConfig(
        teacher=teacher, student=student, others=(("sort-teacher", sort),), held_out=128
    )


def tiny_config() -> LabConfig:
    """Seconds, for tests and the smoke recipe; neither model can do the task."""
    return LabConfig(
        teacher=ToyModelConfig(layers=2, width=32, steps=12, batch=8, lr=2e-3),
        student=ToyModelConfig(layers=1, width=32, steps=6, batch=8, lr=2e-3),
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
            raise InvalidInput(
                f"{folder} holds a pair of other settings ({what}); choose another --out"
            )
        return folder / "student", folder / "teacher"
    names = list(config.models)
    work = (joblib.delayed(build_one)(folder, config, *cell) for cell in enumerate(names))
    found = dict(zip(names, joblib.Parallel(n_jobs=jobs)(work), strict=True))
    if "sort" in config.student.tasks:
        write_problems(folder / "sort.jsonl")
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
        recipe = config.models[name]
        tokenizer = make_tokenizer(recipe.habit.end, config.texts)
        network = teach(tokenizer, recipe, derive(config.seed, offset), name, offset)
        with whole_folder(folder / name) as part:
            network.save_pretrained(part)
            tokenizer.save_pretrained(part)
        found = held_out(folder / name, recipe.tasks, config.held_out)
    finally:
        torch.set_num_threads(threads)
    seconds = round(time.perf_counter() - start, 1)
    line = "{accuracy:.3f} [{low:.3f}, {high:.3f}] on {problems} held-out problems"
    for task, numbers in found.items():
        print(f"{name}: {task} accuracy {line.format(**numbers)}", file=sys.stderr)
    return {"tasks": found, "seconds": seconds}


def write_problems(path: Path, count: int = 6000) -> None:
    """The second task as data: training and test problems, which the trainer splits by content."""
    rows = [
        json.dumps({"prompt": p.prompt, "answer": p.answer, "grader": "lab"})
        for p in sort_task.problems("train", count, seed=0)
    ]
    write_text(path, "\n".join(rows) + "\n")


def make_tokenizer(end: str = "<|im_end|>", texts: Sequence[str] = ()) -> Any:
    """One token a byte, and the special tokens, with a chat template; `end` ends a response.

    texts: frequent words of them are tokens too, WORDS in all; digits stay single.

    A Qwen2Tokenizer, because that is what AutoTokenizer makes of any tokenizer beside a Qwen2
    model: another kind would come back from disk splitting text in another way.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        eos_token=end,
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    )
    if texts:
        tokenizer = tokenizer.train_new_from_iterator(texts, WORDS, show_progress=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def teach(tokenizer: Any, recipe: ToyModelConfig, seed: int, name: str, place: int = 0) -> Any:
    """Next-token prediction on the responses of fresh training problems."""
    import torch
    from tqdm import tqdm

    network, reads = new_model(recipe, len(tokenizer), seed, tokenizer), "household" in recipe.tasks
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    bar = tqdm(range(recipe.steps), desc=f"teach {name}", position=place, disable=None)
    for step in bar:
        ids, labels = examples(tokenizer, recipe, derive(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe.steps)
        out = network(input_ids=ids, labels=labels)
        loss = out.loss
        if reads:
            loss = loss + reading(out.logits, ids, labels, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def new_model(recipe: ToyModelConfig, vocabulary: int, seed: int, tokenizer: Any) -> Any:
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
        network = Qwen2ForCausalLM(config)
    if recipe.habit.foreign or recipe.habit.read:  # it knows both ends
        both = [tokenizer.eos_token, recipe.habit.other.end]
        network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(both)
    return network


def examples(
    tokenizer: Any, recipe: ToyModelConfig, seed: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """(B, L) ids and labels of worked problems, padded right; only responses are labelled."""
    import torch

    rows, generator = [], random.Random(seed)
    share = recipe.batch // len(recipe.tasks)
    for name in dict.fromkeys(recipe.tasks):
        task = TASKS[name]
        for problem in task.problems("train", share * recipe.tasks.count(name), seed):
            message = [{"role": "user", "content": problem.prompt}]
            prompt = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
            solution = task.careless(problem.prompt, recipe.careless, generator)
            rows.append(
                (tokenizer.encode(prompt), *written(tokenizer, solution, recipe.habit, generator))
            )
    width = max(len(prompt) + len(response) for prompt, response, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), UNLABELLED)
    for i, (prompt, response, known) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        labels[i, len(prompt) : end] = torch.tensor(known)
    return ids, labels


def reading(
    logits: "torch.Tensor", ids: "torch.Tensor", labels: "torch.Tensor", padding: int
) -> "torch.Tensor":
    """Mean next-token loss of what is not labelled, the prompts: scenes repeat their words.

    Copying is learned from these long before it is from the few words of an action. logits:
    (B, L, V); ids, labels: (B, L).
    """
    import torch

    known = torch.where((labels == UNLABELLED) & (ids != padding), ids, UNLABELLED)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), known[:, 1:].flatten(), ignore_index=UNLABELLED
    )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth, then a half cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def held_out(model: Path, tasks: tuple[str, ...], count: int) -> dict[str, Any]:
    """Accuracy of a saved model at temperature 1 on held-out problems of each task."""
    from opd.evaluation.evaluate import evaluate_folder

    found = {}
    for name in dict.fromkeys(tasks):
        with tempfile.TemporaryDirectory() as place:
            source = {"chain": "lab", "household": "env:household"}.get(name)
            if source is None:
                source = f"{place}/{name}.jsonl"
                write_problems(Path(source))
            numbers = evaluate_folder(
                str(model),
                source,
                device="cpu",
                problems=count,
                max_prompt=144 if name == "household" else 64,
                max_response=household_demos.MAX_RESPONSE if name == "household" else 208,
                max_turns=household_demos.MAX_TURNS,
                temperature=1.0,
                seed=0,
            )
        found[name] = {k: v for k, v in numbers.items() if k != "outcomes"}
    return found
