"""Asynchronous rollouts: generate batches of future steps while the current step trains.

With lag n, step s + n trains on rollouts from the policy at the start of step s. The policy lag
never exceeds n; that of the first n steps is smaller. With lag 0 a step's rollouts are sampled at
the start of the step. They depend on (config, weights, step) and not on timing, so a run with a lag
is as reproducible as one without.

Replay keeps what one step has sampled for the steps that follow it, with the age that it then has.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diagnostics.batch import Rollouts
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.records.batch_files import load_batch
from opd.data.prompts import Prompts
from opd.runtime import distributed
from opd.runtime.manifest import find_damage, write_manifest
from opd.runtime.staged_folders import list_checkpoints, remove_folder, staged_folder


class TaskRollouts(NamedTuple):
    """A task's rollouts in one step, before any model has scored them."""

    prompts: Prompts
    rollouts: Rollouts
    """Graded responses."""
    accumulators: Mapping[str, Accumulator]
    """Metrics of episodes, or the share of answers that the grader could parse."""


class RolloutPrefetcher:
    """Prefetch of the rollouts of future steps; leaving its context ends all sampling."""

    def __init__(
        self,
        draw: Callable[[int], list[TaskRollouts]],
        stop: Callable[[], None],
        *,
        lag: int,
        steps: int,
        updates: int,
        replay_age: int = 0,
    ) -> None:
        """Create a prefetcher that has sampled nothing yet.

        Args:
            draw: Samples a step's rollouts with the engine's current weights. Runs in another
                thread if `lag` is positive, so it must not read weights that are being updated.
            stop: Makes a running `draw` fail soon; called if the context ends with an error.
            lag: Number of steps that sampling may run ahead of training.
            steps: Number of steps of the run; none is sampled beyond.
            updates: Number of student updates per step.
            replay_age: Number of further steps that use the rollouts of a step; needs a lag of 0.
        """
        self._replay_age = replay_age
        self._draw, self._stop = draw, stop
        self._lag, self._steps, self._updates = lag, steps, updates
        self._pending: dict[int, Future[list[TaskRollouts]]] = {}
        self._thread = ThreadPoolExecutor(1)

    def get(self, step: int) -> list[TaskRollouts]:
        """Return the rollouts of a step with their policy lag, sampling them now if there are none.

        Args:
            step: Step of the run.

        Returns:
            Rollouts of each task of the step.

        Raises:
            OperationFailed: The rollouts are older than lag or replay allow.
        """
        future = self._pending.pop(step, None)
        task_rollouts = self._draw(step) if future is None else future.result()
        for steps_later in range(1, self._replay_age + 1 if future is None else 1):
            # also beyond the last step: a resumed run may have more
            self._pending[step + steps_later] = Future()
            self._pending[step + steps_later].set_result(
                with_age(task_rollouts, steps_later * self._updates)
            )
        for _, rollouts, _ in task_rollouts:
            age = int(rollouts.age.max())
            max_age = max(self._lag, self._replay_age) * self._updates
            if age > max_age:
                raise OperationFailed(
                    f"rollouts of step {step} are {age} updates old; at most {max_age} are allowed"
                )
        return task_rollouts

    def launch(self, step: int) -> None:
        """Start sampling missing rollouts of the next `lag` steps with this step's weights."""
        for future_step in range(step + 1, min(step + self._lag, self._steps - 1) + 1):
            if future_step not in self._pending:
                self._pending[future_step] = self._thread.submit(
                    self._draw_with_age, step, future_step
                )

    def wait(self) -> None:
        """Wait until no sampling is under way, so that the engine's weights may change."""
        for future in self._pending.values():
            future.result()

    def save(self, folder: Path, step: int) -> None:
        """Write prefetched rollouts to the run folder, for the checkpoint of the same step.

        Every rank must call this method and writes its own rollouts. Those of deleted checkpoints
        are removed.

        Args:
            folder: Run folder.
            step: First step that is not yet trained.
        """
        if not (self._lag or self._replay_age):
            return
        target = folder / "ahead" / f"step_{step:06d}"
        with staged_folder(target) as partial_folder:
            process_folder = partial_folder / rank_folder()
            process_folder.mkdir()
            for future_step, future in self._pending.items():
                for task_index, (prompts, rollouts, accumulators) in enumerate(future.result()):
                    name = f"{future_step}_{task_index}"
                    rollouts.save(process_folder / f"{name}.safetensors")
                    write_prompts(process_folder / f"{name}.rest", prompts, accumulators)
            write_manifest(process_folder)
        if distributed.rank() > 0:
            return
        kept_names = {target.name, *(checkpoint.name for checkpoint in list_checkpoints(folder))}
        for stale_folder in (folder / "ahead").glob("step_*"):
            if stale_folder.name not in kept_names:
                remove_folder(stale_folder)

    def load(self, folder: Path, step: int, device: torch.device) -> None:
        """Load the rollouts that `save` wrote; a run that finished at `step` has none.

        Args:
            folder: Run folder.
            step: First step to take.
            device: Device of the tensors.

        Raises:
            InvalidInput: They were written by another number of ranks, or a file is damaged.
        """
        saved_folder = folder / "ahead" / f"step_{step:06d}"
        if saved_folder.exists() and not (saved_folder / rank_folder()).exists():
            num_processes = next(saved_folder.iterdir()).name.split("_")[-1]
            raise InvalidInput(
                f"{saved_folder} holds prefetched rollouts of {num_processes} processes, but this "
                f"run has {distributed.world_size()}: start as many, or delete the folder to "
                "sample the rollouts again"
            )
        if saved_folder.exists() and (problem := find_damage(saved_folder / rank_folder())):
            raise InvalidInput(
                f"{problem}; delete {saved_folder} to sample the rollouts again, from the weights "
                f"of the checkpoint at step {step}"
            )
        rollouts_by_step: dict[int, list[TaskRollouts]] = {}
        files = (saved_folder / rank_folder()).glob("*.rest")
        for path in sorted(files, key=lambda file: tuple(map(int, file.stem.split("_")))):
            prompts, accumulators = read_prompts(path)
            rollouts = load_batch(path.with_suffix(".safetensors")).to(device)
            future_step = int(path.stem.split("_")[0])
            rollouts_by_step.setdefault(future_step, []).append(
                TaskRollouts(prompts.to(device), rollouts, accumulators)
            )
        for future_step, task_rollouts in rollouts_by_step.items():
            self._pending[future_step] = Future()
            self._pending[future_step].set_result(task_rollouts)

    def _draw_with_age(self, current_step: int, step: int) -> list[TaskRollouts]:
        """Sample a step's rollouts and set their age, in updates, at the time they are used."""
        return with_age(self._draw(step), (step - current_step) * self._updates)

    def __enter__(self) -> "RolloutPrefetcher":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stop()
        self._thread.shutdown(cancel_futures=True)


def with_age(task_rollouts: Sequence[TaskRollouts], age: int) -> list[TaskRollouts]:
    """Return rollouts with another age.

    Args:
        task_rollouts: Rollouts of each task.
        age: Number of updates since they were sampled.

    Returns:
        The same rollouts.
    """
    return [
        sample._replace(
            rollouts=sample.rollouts.with_fields(age=torch.full_like(sample.rollouts.prompt, age))
        )
        for sample in task_rollouts
    ]


def rank_folder() -> str:
    """Return the name of this rank's folder, such as "0_of_2"."""
    return f"{distributed.rank()}_of_{distributed.world_size()}"


def write_prompts(path: Path, prompts: Prompts, accumulators: Mapping[str, Accumulator]) -> None:
    """Write the prompts and accumulators that belong to rollouts as one safetensors file."""
    tensors = {"tokens": prompts.tokens, "mask": prompts.mask, "index": prompts.index}
    if prompts.view is not None:
        tensors |= {"view_tokens": prompts.view.tokens, "view_mask": prompts.view.mask}
    for name, accumulator in accumulators.items():
        tensors |= {f"{name}.{i}": tensor for i, tensor in enumerate(accumulator.tensors())}
    header = {"answers": json.dumps(prompts.answers), "played": json.dumps(list(accumulators))}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, header)


def read_prompts(path: Path) -> tuple[Prompts, dict[str, Accumulator]]:
    """Read the prompts and accumulators that `write_prompts` wrote."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    accumulators: dict[str, Accumulator] = {}
    for name in json.loads(header["played"]):
        num_tensors = sum(key.startswith(f"{name}.") for key in tensors)
        accumulators[name] = Mean(*(tensors.pop(f"{name}.{i}") for i in range(num_tensors)))
    answers, index, view = json.loads(header["answers"]), tensors["index"], None
    if "view_tokens" in tensors:
        view = Prompts(
            tokens=tensors["view_tokens"],
            mask=tensors["view_mask"],
            index=index,
            answers=answers,
        )
    prompts = Prompts(
        tokens=tensors["tokens"], mask=tensors["mask"], index=index, answers=answers, view=view
    )
    return prompts, accumulators
