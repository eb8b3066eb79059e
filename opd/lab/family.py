"""A family of pairs with knobs: a good teacher and a weaker student, which differ as one asks.

Both models solve the chain task and the sorting task. First a base model of each is trained, on
right solutions without tags; then it is trained further into what the knobs ask
(`opd.lab.pair_text`, `opd.lab.mismatch`). Bases depend on the seed and on few knobs, so that pairs
of one seed can share them. The seed draws weights, problems and their split. The same knobs give
identical weights on the same machine, with shared bases or without.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from opd.data import sort_task
from opd.lab.knobs import PairKnobs, check_knobs, check_seed
from opd.lab.mismatch import add_gradient, make_batch
from opd.lab.networks import make_network
from opd.lab.pair_lengths import longest_response, step_range
from opd.lab.pair_problems import SORT_LENGTHS, split_prompts, write_problem_files
from opd.lab.pair_text import TrainingToken, own_tokens, write_student, write_teacher
from opd.lab.pair_tokenizer import PairIds, make_pair_tokenizer, pair_ids
from opd.lab.training_loop import optimise
from opd.runtime.seeds import derive_seed
from opd.runtime.staged_folders import staged_folder

ROLES = ("student", "teacher")
MAX_PROMPT = 3 + len("sort ") + SORT_LENGTHS[-1]
"""Tokens of the longest prompt, of a sorting problem."""


@dataclass(frozen=True)
class PairSize:
    """Size of the models of a pair, and how long they are trained."""

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
    "small": PairSize(layers=2, width=64, base_steps=800, further_steps=400),
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
"""Learning rates of Muon, for matrices, and of AdamW, for all other weights."""


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


def build_pair(
    folder: Path, knobs: PairKnobs, seed: int, bases: Path | None = None
) -> tuple[Path, Path]:
    """Build a pair and its files, unless it exists; an interrupted build is continued.

    Writes the models student/ and teacher/, train.jsonl with responses of the teacher, the held-out
    problems validation.jsonl and test.jsonl, other_task.jsonl, and pair.json with the knobs and
    what was measured (`opd.lab.pair_facts`).

    Args:
        folder: The folder of the pair.
        knobs: The knobs.
        seed: Seed of weights, problems and sampling.
        bases: Folder of base models, shared by pairs; None for a folder in that of the pair.
            Processes that run at the same time may share it for different seeds.

    Returns:
        The folders of the student and of the teacher.

    Raises:
        InvalidInput: A knob or the seed cannot be used, or `folder` holds another pair; the message
            lists the differences.
    """
    from opd.lab.pair_facts import measure_pair, write_teacher_responses

    check_knobs(knobs)
    check_seed(seed)
    settings = {"knobs": asdict(knobs), "seed": seed, "limits": asdict(pair_limits(knobs))}
    record = folder / "pair.json"
    if record.exists():
        record_content = json.loads(record.read_text())
        refuse_differences(folder, record_content, settings)
        if "facts" in record_content:
            return folder / "student", folder / "teacher"
    write_text(record, json.dumps(settings, indent=1))
    seconds: dict[str, float] = {}
    with one_thread():
        for role in ROLES:
            if not (folder / role).exists():
                with timed(seconds, role):
                    build_model(folder / role, bases or folder / "bases", role, knobs, seed)
        if not (folder / "other_task.jsonl").exists():  # the last one
            size = SIZES[knobs.size]
            write_problem_files(folder, knobs, seed, size.num_training, size.num_held_out)
        limits = pair_limits(knobs)
        with timed(seconds, "responses"):
            write_teacher_responses(folder, limits.max_prompt, limits.max_response, seed)
        with timed(seconds, "facts"):
            facts = measure_pair(folder, knobs, limits.max_prompt, limits.max_response, seed)
    write_text(record, json.dumps({**settings, "facts": facts, "seconds": seconds}, indent=1))
    return folder / "student", folder / "teacher"


def refuse_differences(
    folder: Path, record_content: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Refuse to build another pair in a folder.

    Args:
        folder: The folder of the pair.
        record_content: Its pair.json.
        settings: Knobs and seed of the pair to build.

    Raises:
        InvalidInput: They differ.
    """
    flat = [{**x["knobs"], "seed": x["seed"]} for x in (record_content, settings)]
    names = [k for k in sorted(flat[0] | flat[1]) if flat[0].get(k) != flat[1].get(k)]
    if names:
        differences = ", ".join(f"{k}: {flat[0].get(k)} -> {flat[1].get(k)}" for k in names)
        raise InvalidInput(f"{folder} holds another pair ({differences}); choose another --out")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, which fixes the order of summation: results do not depend on load."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the processor seconds of a block."""
    start = time.process_time()
    yield
    seconds[name] = round(time.process_time() - start, 1)
    print(f"{name}: {seconds[name]} s", file=sys.stderr)


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
    plain = plain_knobs(role, knobs)
    base = bases / base_name(role, plain, seed)
    if not base.exists():
        layers, width = model_size(plain)
        network = make_network(
            layers,
            width,
            tokenizer,
            derive_seed(seed, ROLES.index(role), 0),
            positions=pair_limits(plain).positions,
            spread=SPREAD,
            previous_token_head=True,
        )
        steps = SIZES[knobs.size].base_steps
        network = train(network, tokenizer, role, plain, seed, 0, steps, BASE_RATES)
        with staged_folder(base) as partial_folder:
            network.save_pretrained(partial_folder)
    network = AutoModelForCausalLM.from_pretrained(base).train()
    network.config.max_position_embeddings = pair_limits(knobs).positions
    steps = SIZES[knobs.size].further_steps
    network = train(network, tokenizer, role, knobs, seed, 1, steps, FURTHER_RATES)
    if role == "student" and knobs.second_end:
        ids = pair_ids(tokenizer)
        network.generation_config.eos_token_id = [ids.end, ids.second_end]
    with staged_folder(target) as partial_folder:
        network.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)


def plain_knobs(role: str, knobs: PairKnobs) -> PairKnobs:
    """Return the knobs of a base model: right solutions without tags, of the same size and length.

    Args:
        role: "student" or "teacher".
        knobs: Knobs of the pair.

    Returns:
        The knobs; those that no base depends on have their default.
    """
    weakness = knobs.student_weakness if role == "student" else "careless"
    return PairKnobs(
        size=knobs.size,
        response_tokens=knobs.response_tokens,
        vocabulary=knobs.vocabulary,
        student_errors=0.0,
        student_weakness=weakness,
    )


def base_name(role: str, plain: PairKnobs, seed: int) -> str:
    """Return the name of the folder of a base model, which has all that it depends on."""
    name = f"{role}-{plain.size}-{plain.response_tokens}-{plain.vocabulary}"
    weakness = "" if plain.student_weakness == "careless" else f"-{plain.student_weakness}"
    return f"{name}{weakness}-seed-{seed}"


def model_size(plain: PairKnobs) -> tuple[int, int]:
    """Return the layers and the width of a base model."""
    size = SIZES[plain.size]
    if plain.student_weakness == "small":
        return 1, size.width // 2
    return size.layers, size.width


def train(
    network: Any,
    tokenizer: Any,
    role: str,
    knobs: PairKnobs,
    seed: int,
    stage: int,
    steps: int,
    rates: tuple[float, float],
) -> Any:
    """Train a model on fresh training text.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        role: "student" or "teacher".
        knobs: What the text is like.
        seed: Seed of the pair.
        stage: 0 for a base, 1 for what follows.
        steps: Training steps.
        rates: Largest learning rates of Muon and of AdamW.

    Returns:
        The trained model in evaluation mode.
    """
    import torch

    ids, prompts = pair_ids(tokenizer), split_prompts(knobs, seed)["train"]
    prompts = [x for x in prompts if int(x.split(":")[0]) in training_steps(role, knobs)]
    parameters = list(network.named_parameters())
    is_matrix = {name: x.dim() == 2 and "embed" not in name for name, x in parameters}
    optimizers = [
        torch.optim.Muon(
            [x for n, x in parameters if is_matrix[n]], lr=rates[0], weight_decay=0.01
        ),
        torch.optim.AdamW(
            [x for n, x in parameters if not is_matrix[n]],
            lr=rates[1],
            betas=(0.9, 0.98),
            weight_decay=0.01,
        ),
    ]

    def add_step_gradient(step: int) -> float:
        generator = random.Random(derive_seed(seed, ROLES.index(role), stage, 1, step))
        rows = training_rows(role, knobs, ids, prompts, generator)
        return add_gradient(network, make_batch(rows, tokenizer.pad_token_id))

    return optimise(network, optimizers, steps, add_step_gradient, role)


def training_steps(role: str, knobs: PairKnobs) -> range:
    """Return the numbers of steps of a model's training problems."""
    steps = step_range(knobs.response_tokens)
    is_short = role == "student" and knobs.student_weakness == "short_sighted"
    return steps[: len(steps) // 2] if is_short else steps


def training_rows(
    role: str, knobs: PairKnobs, ids: PairIds, prompts: list[str], generator: random.Random
) -> list[tuple[list[int], list[TrainingToken]]]:
    """Write the rows of a training batch, some of them sorting problems, which both models solve.

    Args:
        role: "student" or "teacher".
        knobs: What the text is like.
        ids: Ids of the tokenizer.
        prompts: Training problems of the chain task.
        generator: Source of randomness.

    Returns:
        The ids of each prompt, and its response.
    """
    num_rows = max(MIN_ROWS, BATCH_TOKENS // knobs.response_tokens)
    num_sort, limits = num_rows // SORT_SHARE, pair_limits(knobs)
    write = write_student if role == "student" else write_teacher
    texts = [
        (x, write(x, knobs, ids, generator)) for x in generator.sample(prompts, num_rows - num_sort)
    ]
    for problem in sort_task.problems("train", num_sort, generator.getrandbits(32), SORT_LENGTHS):
        solution = [*ids.encode(problem.solution), ids.end]
        texts.append((problem.prompt, own_tokens(solution)))
    # with loops, a solution may be longer than the models' positions
    longest = limits.positions - limits.max_prompt
    return [(ids.encode_prompt(prompt), text[:longest]) for prompt, text in texts]
