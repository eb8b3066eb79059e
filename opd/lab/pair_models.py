"""Models of a pair: a base that solves both tasks, and what is trained from it.

A base is trained on right solutions. That of pairs with foreign tags has seen tags of both forms at
every rate, since tags move what a model has to find in its context; that of pairs without has seen
none.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opd.data import sort_task
from opd.lab.knobs import PairKnobs
from opd.lab.mismatch import add_gradient, make_batch
from opd.lab.networks import make_network
from opd.lab.pair_lengths import longest_response, step_range
from opd.lab.pair_problems import SORT_LENGTHS, split_prompts
from opd.lab.pair_text import (
    TrainingToken,
    own_tokens,
    write_base,
    write_student,
    write_teacher,
)
from opd.lab.pair_tokenizer import PairIds, make_pair_tokenizer, pair_ids
from opd.lab.training_loop import optimise
from opd.runtime.seeds import derive_seed
from opd.runtime.staged_folders import staged_folder

ROLES = ("student", "teacher")
MAX_PROMPT = 3 + len("sort ") + SORT_LENGTHS[-1]
"""Tokens of the longest prompt, of a sorting problem."""


@dataclass(frozen=True)
class PairSize:
    """Size of the models of a pair, how long they are trained, and how many problems there are."""

    layers: int
    width: int
    base_steps: int
    """Training steps of a base model."""
    further_steps: int
    """Training steps from the base model."""
    num_training: int = 1000
    """Largest number of problems of the training file."""
    num_held_out: int = 500
    """Largest number of problems of each other file."""


SIZES = {
    "tiny": PairSize(1, 32, base_steps=6, further_steps=4, num_training=24, num_held_out=16),
    "small": PairSize(layers=2, width=64, base_steps=600, further_steps=300),
    "medium": PairSize(layers=2, width=128, base_steps=800, further_steps=400),
    "large": PairSize(layers=4, width=256, base_steps=800, further_steps=400),
}
"""Sizes by name; models of the first, for tests, do not solve the tasks."""
BATCH_TOKENS = 1024
"""Tokens of the responses of a training batch, about."""
MIN_ROWS = 4
"""Smallest number of rows of a training batch."""
SORT_SHARE = 4
"""One row in this many is a sorting problem."""
SPREAD = 0.1
"""Standard deviation of new weights; with 0.02 the small models learn half as fast."""
BASE_RATES, FURTHER_RATES = (0.02, 5e-3), (0.01, 2.5e-3)
"""Learning rates of Muon, for matrices, and of AdamW, for all other weights. With AdamW alone, the
small models need three times as many steps."""

Write = Callable[[str, random.Random], list[TrainingToken]]
"""Writes the training response to a prompt."""


@dataclass(frozen=True)
class PairLimits:
    """Limits of a pair in tokens."""

    max_prompt: int
    """Longest prompt."""
    max_response: int
    """Response budget of runs and evaluations."""
    positions: int
    """Positions of both models."""


def pair_limits(knobs: PairKnobs) -> PairLimits:
    """Return the limits of a pair in tokens.

    Args:
        knobs: Knobs of the pair.

    Returns:
        The limits; with loops, the budget is twice the longest solution, and may be hit.
    """
    tag_tokens = 0 if knobs.foreign_tags == 0 else 3
    longest = longest_response(step_range(knobs.response_tokens), tag_tokens)
    longest *= 2 if knobs.teacher_loops or knobs.student_loops else 1
    budget = knobs.response_budget or longest
    return PairLimits(MAX_PROMPT, budget, MAX_PROMPT + max(longest, budget))


def build_model(target: Path, bases: Path, role: str, knobs: PairKnobs, seed: int) -> None:
    """Train a base model, unless it exists, and train it further into what the knobs ask.

    Args:
        target: Folder of the model.
        bases: Folder of base models.
        role: "student" or "teacher".
        knobs: Knobs of the pair.
        seed: Seed of the pair.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = make_pair_tokenizer(knobs.vocabulary)
    ids = pair_ids(tokenizer)
    base = bases / base_name(role, knobs, seed)
    if not base.exists():
        write: Write = partial(write_base, has_tags=knobs.foreign_tags > 0, ids=ids)
        network = new_model(role, knobs, seed, tokenizer)
        train(network, ids, role, knobs, seed, write, SIZES[knobs.size].base_steps, BASE_RATES)
        with staged_folder(base) as partial_folder:
            network.save_pretrained(partial_folder)
    network = AutoModelForCausalLM.from_pretrained(base).train()
    network.config.max_position_embeddings = pair_limits(knobs).positions
    write = partial(write_student if role == "student" else write_teacher, knobs=knobs, ids=ids)
    train(network, ids, role, knobs, seed, write, SIZES[knobs.size].further_steps, FURTHER_RATES)
    if role == "student" and knobs.second_end:
        network.generation_config.eos_token_id = [ids.end, ids.second_end]
    with staged_folder(target) as partial_folder:
        network.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)


def base_name(role: str, knobs: PairKnobs, seed: int) -> str:
    """Return the name of the folder of a base model, which has all that it depends on."""
    name = f"{role}-seed-{seed}-{knobs.size}-{knobs.response_tokens}-{knobs.vocabulary}"
    name += "-tags" if knobs.foreign_tags > 0 else ""
    if role == "student" and knobs.student_weakness != "careless":
        name += f"-{knobs.student_weakness}"
    return name


def new_model(role: str, knobs: PairKnobs, seed: int, tokenizer: Any) -> Any:
    """Initialise a model of a pair; a small student has one layer of half the width."""
    size = SIZES[knobs.size]
    is_small = role == "student" and knobs.student_weakness == "small"
    return make_network(
        1 if is_small else size.layers,
        max(32, size.width // 2) if is_small else size.width,
        tokenizer,
        derive_seed(seed, ROLES.index(role)),
        positions=pair_limits(PairKnobs(response_tokens=knobs.response_tokens)).positions,
        spread=SPREAD,
        previous_token_head=True,
    )


def train(
    network: Any,
    ids: PairIds,
    role: str,
    knobs: PairKnobs,
    seed: int,
    write: Write,
    steps: int,
    rates: tuple[float, float],
) -> None:
    """Train a model on fresh training text, with Muon for matrices and AdamW for the rest.

    Args:
        network: The model.
        ids: Ids of its tokenizer.
        role: "student" or "teacher".
        knobs: Knobs of the pair, for the lengths of problems.
        seed: Seed of the pair.
        write: Writes the responses.
        steps: Training steps.
        rates: Largest learning rates of Muon and of AdamW.
    """
    import torch

    prompts = training_prompts(role, knobs, seed)
    parameters = list(network.named_parameters())
    is_matrix = {name: x.dim() == 2 and "embed" not in name for name, x in parameters}
    matrices = [x for name, x in parameters if is_matrix[name]]
    vectors = [x for name, x in parameters if not is_matrix[name]]
    optimizers = [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=0.01),
        torch.optim.AdamW(vectors, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def add_step_gradient(step: int) -> float:
        generator = random.Random(derive_seed(seed, ROLES.index(role), steps, step))
        rows = training_rows(prompts, knobs, ids, write, generator)
        return add_gradient(network, make_batch(rows, ids.second_end))

    optimise(network, optimizers, steps, add_step_gradient, role)


def training_prompts(role: str, knobs: PairKnobs, seed: int) -> list[str]:
    """Return a model's training problems: of a short-sighted student the shorter half."""
    steps = step_range(knobs.response_tokens)
    if role == "student" and knobs.student_weakness == "short_sighted":
        steps = steps[: len(steps) // 2]
    prompts = split_prompts(knobs, seed)["train"]
    return [prompt for prompt in prompts if int(prompt.split(":")[0]) in steps]


def training_rows(
    prompts: list[str], knobs: PairKnobs, ids: PairIds, write: Write, generator: random.Random
) -> list[tuple[list[int], list[TrainingToken]]]:
    """Write the rows of a training batch, some of them sorting problems, which both models solve.

    Args:
        prompts: Training problems of the chain task.
        knobs: Knobs of the pair, for the lengths of problems.
        ids: Ids of the tokenizer.
        write: Writes the responses to problems of the chain task.
        generator: Source of randomness.

    Returns:
        The ids of each prompt, and its response.
    """
    num_rows = max(MIN_ROWS, BATCH_TOKENS // knobs.response_tokens)
    num_sort, limits = num_rows // SORT_SHARE, pair_limits(knobs)
    chain_prompts = generator.sample(prompts, num_rows - num_sort)
    texts = [(prompt, write(prompt, generator)) for prompt in chain_prompts]
    sort_seed = generator.getrandbits(32)
    for problem in sort_task.problems("train", num_sort, sort_seed, SORT_LENGTHS):
        solution = [*ids.encode(problem.solution), ids.end]
        texts.append((problem.prompt, own_tokens(solution)))
    # with loops, a solution may be longer than the models' positions
    longest = limits.positions - limits.max_prompt
    return [(ids.encode_prompt(prompt), text[:longest]) for prompt, text in texts]
