"""Prompts: deterministic batches of verifiable problems, encoded for a model."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd.problems import Problem, grade, problems

Grader = Callable[[str, str], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Encoded prompts, padded on the left.

    tokens (B, P) long; mask (B, P) bool; index (B,) long, equal for rows of one prompt; answers:
    what the grader compares with.
    """

    tokens: Tensor
    mask: Tensor
    index: Tensor
    answers: list[str]

    def __len__(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device) -> "Prompts":
        moved = (self.tokens.to(device), self.mask.to(device), self.index.to(device))
        return Prompts(tokens=moved[0], mask=moved[1], index=moved[2], answers=self.answers)

    def rows(self, index: list[int]) -> "Prompts":
        answers = [self.answers[i] for i in index]
        cut = Prompts(
            tokens=self.tokens[index],
            mask=self.mask[index],
            index=self.index[index],
            answers=answers,
        )
        first = int(cut.mask.any(0).nonzero()[0])
        return Prompts(
            tokens=cut.tokens[:, first:], mask=cut.mask[:, first:], index=cut.index, answers=answers
        )


@dataclass(frozen=True)
class Task:
    """Training problems by step, held-out problems, and how a response is graded."""

    train: Callable[[int, int], list[Problem]]
    test: Callable[[int], list[Problem]]
    grade: Grader


def load_task(source: str, seed: int) -> Task:
    """The task called "lab", or a file of problems (columns prompt, answer).

    A file's last tenth (at least one row, at most 1,000) is held out; training draws from the
    rest, reshuffled every epoch.
    """
    if source == "lab":
        return Task(
            train=lambda step, count: problems("train", count, seed * 1_000_003 + step),
            test=lambda count: problems("test", count, 0),
            grade=grade,
        )
    rows = read_problems(Path(source))
    held = min(max(1, len(rows) // 10), 1000)
    train, test = rows[:-held], rows[-held:]

    def draw(step: int, count: int) -> list[Problem]:
        return [train[i] for i in epoch_indices(len(train), step * count, count, seed)]

    return Task(train=draw, test=lambda count: test[:count], grade=exact_match)


def epoch_indices(size: int, first: int, count: int, seed: int) -> list[int]:
    """`count` indices from position `first` of an endless sequence of shuffled epochs."""
    order: dict[int, list[int]] = {}
    picked = []
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if epoch not in order:
            order[epoch] = random.Random(f"{seed}-{epoch}").sample(range(size), size)
        picked.append(order[epoch][place])
    return picked


def read_problems(path: Path) -> list[Problem]:
    """Problems of a .jsonl or .parquet file with the columns prompt and answer."""
    if not path.exists():
        raise FileNotFoundError(f'task {str(path)!r} is neither "lab" nor an existing file')
    if path.suffix == ".parquet":
        import pandas

        records: list[dict[str, Any]] = pandas.read_parquet(path).to_dict("records")
    else:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, record in enumerate(records):
        if missing := {"prompt", "answer"} - record.keys():
            raise ValueError(f"{path} row {number} lacks {sorted(missing)}; has {sorted(record)}")
    if len(records) < 2:
        raise ValueError(f"{path} has {len(records)} problems; at least 2 are needed")
    return [Problem(prompt=str(r["prompt"]), answer=str(r["answer"])) for r in records]


def exact_match(response: str, answer: str) -> float:
    """1 if what follows the last closing think tag is the answer, white space aside."""
    return float(response.rsplit("</think>", 1)[-1].strip() == answer.strip())


def encode(tokenizer: Any, chosen: list[Problem], repeats: int, max_prompt: int) -> Prompts:
    """Chat-templated (where the tokenizer has a template) prompts, each `repeats` times.

    Raises:
      ValueError: a prompt is longer than `max_prompt` tokens.
    """
    encoded = [encode_one(tokenizer, problem.prompt) for problem in chosen]
    width = max(len(ids) for ids in encoded)
    if width > max_prompt:
        raise ValueError(f"a prompt has {width} tokens, max_prompt is {max_prompt}")
    tokens = torch.zeros(len(encoded), width, dtype=torch.long)
    mask = torch.zeros(len(encoded), width, dtype=torch.bool)
    for i, ids in enumerate(encoded):
        tokens[i, width - len(ids) :] = torch.tensor(ids)
        mask[i, width - len(ids) :] = True
    index = torch.arange(len(encoded)).repeat_interleave(repeats)
    answers = [problem.answer for problem in chosen for _ in range(repeats)]
    return Prompts(tokens=tokens[index], mask=mask[index], index=index, answers=answers)


def encode_one(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        ids = tokenizer.encode(prompt)
    else:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"the prompt {prompt!r} encodes to no token")
    return ids
