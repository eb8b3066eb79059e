"""Rollouts ahead of the update: what later steps learn from is sampled while this one is made.

With depth n, the rollouts of step s + n are sampled from the weights that step s begins with, so
that they are n steps old when their turn comes: the first n steps' are younger, none is older.
Depth 0 samples at a step's turn. What a step gets depends on (config, weights, step) and on
nothing that is a matter of time, so a run with depth n is as reproducible as one without.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diagnostics.batch import Rollouts
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.records.batch_files import load
from opd.data.prompts import Prompts
from opd.runtime import distributed
from opd.runtime.manifest import damage, write_manifest
from opd.runtime.staged_folders import checkpoints, remove, whole_folder

TaskRollouts = tuple[Prompts, Rollouts, Mapping[str, Accumulator]]
"""Of a task's step: prompts, graded responses to them, and what became of episodes."""


class RolloutPrefetcher:
    """The rollouts of coming steps; a context that ends with nothing left under way.

    Args:
      draw: samples a step's rollouts with the engine's present weights; called in another thread
        if depth is above 0, so it must read no weights that are being updated.
      stop: makes a `draw` under way end soon, with an error; called where the block fails.
      steps: of the whole run; none is sampled beyond. updates: of the student in a step.
    """

    def __init__(
        self,
        draw: Callable[[int], list[TaskRollouts]],
        stop: Callable[[], None],
        *,
        depth: int,
        steps: int,
        updates: int,
    ) -> None:
        self._draw, self._stop = draw, stop
        self._depth, self._steps, self._updates = depth, steps, updates
        self._coming: dict[int, Future[list[TaskRollouts]]] = {}
        self._thread = ThreadPoolExecutor(1)

    def take(self, step: int) -> list[TaskRollouts]:
        """The step's rollouts, with their age; sampled now if they were not before.

        Raises:
          RuntimeError: they are older than `depth` steps.
        """
        coming = self._coming.pop(step, None)
        drawn = self._draw(step) if coming is None else coming.result()
        for _, rollouts, _ in drawn:
            oldest, most = int(rollouts.age.max()), self._depth * self._updates
            if oldest > most:
                raise OperationFailed(
                    f"rollouts of step {step} are {oldest} updates old, at most {most} are allowed"
                )
        return drawn

    def begin(self, step: int) -> None:
        """Start sampling what the next `depth` steps lack, with the weights of this one."""
        for later in range(step + 1, min(step + self._depth, self._steps - 1) + 1):
            if later not in self._coming:
                self._coming[later] = self._thread.submit(self._drawn, step, later)

    def settle(self) -> None:
        """Wait until nothing is being sampled: the engine's weights may change."""
        for coming in self._coming.values():
            coming.result()

    def save(self, folder: Path, step: int) -> None:
        """Keep in a run folder what was sampled from `step` on, beside the checkpoint to come.

        Every process has to call, and keeps its own.
        """
        if not self._depth:
            return
        final = folder / "ahead" / f"step_{step:06d}"
        with whole_folder(final) as folder_part:
            part = folder_part / own_folder()
            part.mkdir()
            for later, coming in self._coming.items():
                for place, (prompts, rollouts, played) in enumerate(coming.result()):
                    name = f"{later}_{place}"
                    rollouts.save(part / f"{name}.safetensors")
                    write_rest(part / f"{name}.rest", prompts, played)
            write_manifest(part)
        if distributed.rank() > 0:
            return
        kept = {final.name, *(checkpoint.name for checkpoint in checkpoints(folder))}
        for old in (folder / "ahead").glob("step_*"):
            if old.name not in kept:
                remove(old)

    def load(self, folder: Path, step: int, device: torch.device) -> None:
        """Take up what `save` kept; a run that ended at `step` kept nothing.

        Raises:
          ValueError: another number of processes kept it, or a file is damaged.
        """
        kept = folder / "ahead" / f"step_{step:06d}"
        if kept.exists() and not (kept / own_folder()).exists():
            count = next(kept.iterdir()).name.split("_")[-1]
            raise InvalidInput(
                f"{kept} holds rollouts ahead of {count} processes, and these are "
                f"{distributed.size()}: start as many, or delete it, and they are sampled anew"
            )
        if kept.exists() and (problem := damage(kept / own_folder())):
            raise InvalidInput(
                f"{problem}; delete {kept}, and the rollouts are sampled anew, from the weights of "
                f"the checkpoint at step {step}"
            )
        found: dict[int, list[TaskRollouts]] = {}
        files = (kept / own_folder()).glob("*.rest")
        for path in sorted(files, key=lambda file: tuple(map(int, file.stem.split("_")))):
            prompts, played = read_rest(path)
            rollouts = load(path.with_suffix(".safetensors")).to(device)
            later = int(path.stem.split("_")[0])
            found.setdefault(later, []).append((prompts.to(device), rollouts, played))
        for later, drawn in found.items():
            self._coming[later] = Future()
            self._coming[later].set_result(drawn)

    def _drawn(self, now: int, step: int) -> list[TaskRollouts]:
        age = (step - now) * self._updates
        return [
            (prompts, replace(rollouts, age=torch.full_like(rollouts.prompt, age)), played)
            for prompts, rollouts, played in self._draw(step)
        ]

    def __enter__(self) -> "RolloutPrefetcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stop()
        self._thread.shutdown(cancel_futures=True)


def own_folder() -> str:
    """The name of this process's folder among those of as many processes."""
    return f"{distributed.rank()}_of_{distributed.size()}"


def write_rest(path: Path, prompts: Prompts, played: Mapping[str, Accumulator]) -> None:
    """What belongs to rollouts beside themselves, as one safetensors file."""
    tensors = {name: getattr(prompts, name) for name in ("tokens", "mask", "index")}
    for name, total in played.items():
        tensors |= {f"{name}.{i}": x for i, x in enumerate(total.tensors())}
    header = {"answers": json.dumps(prompts.answers), "played": json.dumps(list(played))}
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path, header)


def read_rest(path: Path) -> tuple[Prompts, dict[str, Accumulator]]:
    """What `write_rest` wrote."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    played: dict[str, Accumulator] = {}
    for name in json.loads(header["played"]):
        parts = sum(key.startswith(f"{name}.") for key in tensors)
        played[name] = Mean(*(tensors.pop(f"{name}.{i}") for i in range(parts)))
    return Prompts(**tensors, answers=json.loads(header["answers"])), played
