"""Sizes of a planned step: how many rows, how long, in which passes."""

import math
from dataclasses import dataclass

from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import is_function_name
from opd.analysis.plan.passes.model import Rows
from opd.config.settings import Config
from opd.envs.task import is_games


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Rows and tokens of a step on one device."""

    rows: int
    """Responses of a step on this device."""
    prompt: int
    """Prompt length in tokens, of every row."""
    teacher_prompt: int
    """Prompt length of what the teacher reads."""
    longest: int
    """Longest response in tokens, which memory and decoding are planned for."""
    mean: int
    """Mean response length in tokens, which time is planned for."""
    rollout_rows: int
    """Rows of one batch of rollouts."""
    evaluated_rows: int
    """Rows of one batch of an evaluation; 0 without one."""
    micro_rows: int
    """Rows of a micro-batch of the longest responses while a batch is scored."""
    rows_per_update: int
    """Responses of an optimizer step on this device."""
    update_rows: int
    """Rows of a micro-batch of the longest responses in an update."""

    @property
    def micro_batch(self) -> Rows:
        """Shape of a micro-batch of the student while a batch is scored."""
        return Rows(count=self.micro_rows, prompt=self.prompt, response=self.longest)

    @property
    def teacher_micro_batch(self) -> Rows:
        """Shape of the same rows as the teacher reads them."""
        return Rows(count=self.micro_rows, prompt=self.teacher_prompt, response=self.longest)

    @property
    def update_batch(self) -> Rows:
        """Shape of a micro-batch in an update."""
        return Rows(count=self.update_rows, prompt=self.prompt, response=self.longest)

    @property
    def has_several_micro_batches(self) -> bool:
        """Whether a micro-batch of an update may find the gradients of an earlier one."""
        return self.rows_per_update > self.update_rows

    def num_passes(self, rows: Rows) -> float:
        """Return how many passes of a shape a step takes by its mean length.

        Args:
            rows: Shape of a pass.

        Returns:
            Ratio of the positions.
        """
        positions = self.rows * (self.prompt + self.mean)
        return positions / (rows.count * (self.prompt + rows.response))


def make_workload(config: Config, gpus: int, prompt_tokens: int, mean_response: int) -> Workload:
    """Return the sizes of a step.

    Args:
        config: Settings of the run or task.
        gpus: Number of processes, one a device.
        prompt_tokens: Length of a prompt; 0 means `max_prompt`.
        mean_response: Mean response length; 0 means `max_response`.

    Returns:
        The sizes.

    Raises:
        InvalidInput: A length is beyond the settings, there are more devices than prompts, or the
            task is a game whose rows cannot be known.
    """
    data, longest = config.data, config.rollout.max_response
    for name, value, limit_name, limit in (
        ("prompt_tokens", prompt_tokens, "max_prompt", data.max_prompt),
        ("mean_response", mean_response, "max_response", longest),
    ):
        if not 0 <= value <= limit:
            raise InvalidInput(
                f"{name} is {value}, expected at most {limit_name} ({limit}), or 0 for that"
            )
    if gpus < 1:
        raise InvalidInput(f"gpus is {gpus}; expected at least 1")
    if gpus > data.prompts_per_step:
        raise InvalidInput(
            f"gpus is {gpus}, but a step has {data.prompts_per_step} prompts and each process "
            "needs one; raise prompts_per_step or plan fewer GPUs"
        )
    turns = 1
    if is_games(data.task):
        if config.games.layout == "trajectory":
            raise InvalidInput(
                f"task is {data.task} with layout trajectory, whose rows are as long as the games; "
                "plan it with --task lab, --max-prompt and --max-response of a whole episode"
            )
        turns = config.games.max_turns
    rows = math.ceil(data.prompts_per_step / gpus) * data.group_size * turns
    prompt = prompt_tokens or data.max_prompt
    rollout_rows = min(rows // turns, config.rollout.generation_batch_size)
    evaluation = config.evaluation
    evaluated = math.ceil(evaluation.eval_problems * evaluation.eval_samples / gpus)
    if not data.answer_column and not is_games(data.task):
        evaluated = 0
    micro_rows = max(1, config.hardware.max_tokens_per_microbatch // (prompt + longest))
    rows_per_update = math.ceil(rows / config.optimizer.updates_per_batch)
    update_rows = min(rows_per_update, micro_rows)
    loss = config.objective
    if is_function_name(loss.objective) and loss.loss_divisor == "update":
        update_rows = rows_per_update  # a loss of the user's own that sees the whole update
    return Workload(
        rows=rows,
        prompt=prompt,
        teacher_prompt=config.view.max_teacher_prompt or prompt,
        longest=longest,
        mean=mean_response or longest,
        rollout_rows=rollout_rows,
        evaluated_rows=min(evaluated, config.rollout.generation_batch_size),
        micro_rows=min(rows, micro_rows),
        rows_per_update=rows_per_update,
        update_rows=update_rows,
    )
