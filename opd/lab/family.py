"""A family of pairs with knobs: a good teacher and a weaker student, which differ as one asks.

Both models solve the chain task and the sorting task. First a base model of each is trained, on
right solutions; then it is trained further into what the knobs ask (`opd.lab.pair_text`,
`opd.lab.mismatch`). Bases depend on the seed and on few knobs, so that pairs of one seed can share
them. The seed draws weights, problems and their split. The same knobs give identical weights on the
same machine, with shared bases or without.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from opd.lab.knobs import PairKnobs, check_knobs, check_seed
from opd.lab.pair_facts import measure_pair, write_teacher_responses
from opd.lab.pair_models import ROLES, SIZES, build_model, pair_limits
from opd.lab.pair_problems import write_problem_files


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
