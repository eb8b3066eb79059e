"""The settings of a training run: one frozen dataclass, saved as `config.json` in the run folder.

Does not import torch, so that the command line starts quickly. The attribute docstrings are the
help of the command line.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields, read_object, short_repr
from diagnostics.records.renamed import SETTINGS, present_settings
from opd.config.validation import field_problems
from opd.serving.addresses import address_problem, is_url
from opd.tokens.mask_rules import parse_rules

TRUST_HELP = "run Python code that comes with a model; review it first"
"""Help of the option --trust-remote-code."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of one of several tasks; None means the run's setting of the same name."""

    name: str
    """Label of the task in rows and evaluations."""
    task: str
    """Source of its problems; see `Config.task`."""
    weight: float = 1.0
    """Weight of the task in `Config.task_order` "weighted" and "mixed"."""
    teacher: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    grader: str | None = None
    system: str | None = None
    max_prompt: int | None = None
    max_response: int | None = None
    mask: tuple[str, ...] | None = None
    layout: Literal["turns", "trajectory"] | None = None
    max_turns: int | None = None
    history_turns: int | None = None
    eval_task: str | None = None
    eval_prompt_column: str | None = None
    eval_answer_column: str | None = None
    eval_problems: int | None = None

    def __post_init__(self) -> None:
        problems = [f"task {self.name!r}: {x}" for x in field_problems(self, RANGES)]
        raise_problems(
            problems or ([] if self.name else ["name of a task is ''; it must not be empty"])
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of `opd train`; a recipe is a function that returns one."""

    student: str
    """Causal LM to train: a folder or a Hugging Face hub name."""
    teacher: str
    """Frozen causal LM with the same vocabulary: a folder or a hub name; "base": the student
    without its LoRA adapters; "ema": an exponential moving average of the student; or the address
    of a vLLM server, http://HOST:PORT/v1 (opd.teachers.client)."""
    out: str
    """Run folder. An unfinished run in it is resumed."""

    # --- data -----------------------------------------------------------------------------------
    task: str = "lab"
    """Source of the prompts: "lab"; a .jsonl, .json or .parquet file, a folder, or hf:NAME:SPLIT
    (opd.data.sources); a named dataset such as dapo-math, math-500, aime24, gsm8k:PATH or gym:TASK
    (opd.data.benchmarks); or text games, env:household, env:alfworld or env:MODULE:FUNCTION
    (opd.envs.task)."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    grader: str = ""
    """Grader of responses: exact, numeric, math, gym or lab (opd.data.grading.graders), or a
    function of (response, answer) that returns a number, as MODULE:FUNCTION or FILE.py:FUNCTION.
    Empty: the task's own grader, or exact."""
    system: str = ""
    """System message of every prompt."""
    max_prompt: int = 512
    """Maximum prompt length in tokens. Longer prompts are an error; a game episode ends when its
    next prompt would be longer."""
    skip_long_prompts: bool = False
    """Skip prompts longer than max_prompt and report their number, instead of an error."""
    prompts_per_step: int = 16
    """Number of distinct prompts per step."""
    group_size: int = 4
    """Number of responses per prompt."""
    tasks: Annotated[tuple[TaskSettings, ...], tyro.conf.Suppress] = ()
    """Several tasks, each with its own teacher; on the command line a file, --tasks FILE.toml
    (opd.training.multitask). `task` and `teacher` are the defaults of tasks that set none."""
    task_order: Literal["alternate", "weighted", "mixed"] = "alternate"
    """Order of several tasks. "alternate": one task per step, in turn; "weighted": one task per
    step, drawn by weight; "mixed": all tasks in every step, with prompts in proportion to their
    weights."""

    # --- rollouts -------------------------------------------------------------------------------
    engine: Literal["hf", "vllm", "servers"] = "hf"
    """Rollout engine. "hf": Hugging Face generate; "vllm": vLLM on the same GPU (extra vllm);
    "servers": the vLLM servers in rollout_servers, which load the weights after every step
    (docs/servers.md)."""
    rollout_servers: tuple[str, ...] = ()
    """Addresses of the rollout servers, each http://HOST:PORT/v1."""
    weights_folder: str = ""
    """Folder through which the servers load the weights. Empty: weights/ in the run folder."""
    rollout_lag: int = 0
    """Number of steps that rollout generation may run ahead of training. 0 is on-policy; 1 overlaps
    generation with training. Requires engine=servers."""
    temperature: float = 1.0
    """Softmax temperature of rollouts, and of both models in the loss."""
    top_p: float = 1.0
    """Nucleus of the rollouts. The loss always uses the full softmax."""
    max_response: int = 512
    """Maximum response length in tokens; for games, of each turn."""
    generation_batch_size: int = 256
    """Rows per generate call of engine hf; their key-value cache must fit in memory."""
    layout: Literal["turns", "trajectory"] = "turns"
    """Rows of game episodes. "turns": one row per turn, whose prompt has the goal, recent history
    and the observation; "trajectory": one row per episode as a conversation, in which only the
    student's responses are supervised."""
    max_turns: int = 30
    """Maximum number of actions in a game episode."""
    history_turns: int = 2
    """Number of previous turns in a game prompt of layout "turns"."""

    # --- objective ------------------------------------------------------------------------------
    objective: str = "teacher_topk"
    """Training objective; one of opd.objectives.factory.OBJECTIVES."""
    gamma: float = 0.0
    """Discount factor of future costs, for objectives with a score-function term."""
    beta: float | None = None
    """Interpolation of full_jsd: 0 is forward KL, 1 is reverse KL."""
    support_k: int = 16
    """K, the number of token ids per position in top-K supports and diagnostics."""
    baseline: str = "none"
    """Baseline subtracted from the credit; one of opd.objectives.credit.BASELINES, such as
    leave_one_out (mean of the prompt's other responses) or position_mean (mean over the responses
    to other prompts)."""
    ratio: str = "none"
    """Importance ratio of student to sampler; one of opd.objectives.credit.RATIOS."""
    ratio_clip: float | None = None
    """Clip log-ratios to this many nats, in sampled costs and in reverse KL."""
    ppo_clip: tuple[float, float, float] | None = None
    """Lower, upper and dual clip of sampled_token_clipped; default 0.2, 0.2, 3."""
    reward_weight: float = 0.0
    """Weight of the graded reward, added to the distillation objective."""
    reward_baseline: str = "leave_one_out"
    """Baseline of the reward; one of opd.objectives.credit.ADVANTAGES."""
    entropy_top_fraction: float = 1.0
    """Fraction of tokens with the highest student entropy that enter the loss. Ties (within 1e-4
    nats of the threshold) are resolved in favour of earlier prompts and positions."""
    denominator: str = "token_mean"
    """Normalisation of the loss; one of opd.objectives.reduction.DENOMINATORS."""
    mask: tuple[str, ...] = ()
    """Rules for tokens that are excluded from supervision, such as role:eos, string:<think>:first
    or paper (opd.tokens.mask_rules)."""
    mask_scope: Literal["cost", "loss"] = "cost"
    """Effect of the mask when credits sum later costs or baselines average other costs. "cost":
    costs of masked tokens are removed from every credit and baseline, so that a tag with a cost of
    tens of nats has no effect (the gradient of the supervised tokens' costs). "loss": only the loss
    terms of masked tokens are removed, as in the published code (the gradient of all tokens'
    costs). In both cases masked tokens count for gamma and in the sequence ratio."""
    map_eos: bool = False
    """Where the student ends a response with an EOS that the teacher does not use, score the
    teacher's own EOS instead (opd.tokens.eos)."""
    allow_collapse: bool = False
    """Allow objectives with an un-normalised support, which are known to collapse."""
    allow_unweighted: bool = False
    """With several updates per batch or rollout_lag, train on rollouts of an older policy without
    importance weights (variants V2 to V5 of the paper)."""

    # --- optimizer ------------------------------------------------------------------------------
    steps: int = 100
    """Number of training steps, each on new rollouts."""
    updates_per_batch: int = 1
    """Optimizer steps per batch of rollouts, each on a part of the prompts."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine that reaches 0 one step after the
    last."""
    warmup: int = 0
    """Steps of linear warm-up: 1/(warmup + 1) of the learning rate, 2/(warmup + 1), ..., 1."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are clipped."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the linear layers (extra lora); 0 trains all weights."""
    lora_alpha: float = 32.0
    """LoRA alpha; the adapters are scaled by alpha / rank."""
    ema_decay: float = 0.99
    """Decay of teacher "ema" per optimizer step."""
    seed: int = 0
    """Random seed."""

    # --- record ---------------------------------------------------------------------------------
    loggers: tuple[str, ...] = ()
    """Loggers in addition to rows.jsonl: tensorboard, wandb, trackio (extras of these names)."""
    full_metrics_every: int = 1
    """Steps between full-vocabulary metrics (exact KL, entropies, ranks), if the objective does not
    need the student's full distribution. Other steps compute top-K and sampled-token metrics
    only."""
    probe_every: int = 0
    """Steps between gradient probes (opd.training.gradient_probe), which measure signal, noise and
    bias of the LM head's gradient; 0 disables them. With top_p below 1 a probe samples its own
    rollouts."""
    probe_blocks: tuple[str, ...] = ()
    """Further layers whose gradients the probe measures, as shell patterns of their names, such as
    "*norm" or "model.layers.3.mlp.down_proj"; costs 4 to 6 backward passes per probe."""
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    eval_task: str = ""
    """Source of the evaluation problems. Empty: a held-out tenth of `task`."""
    eval_prompt_column: str = "prompt"
    """Column of eval_task with the prompt."""
    eval_answer_column: str = "answer"
    """Column of eval_task with the reference answer."""
    eval_problems: int = 256
    """Number of held-out problems per evaluation."""
    eval_samples: int = 1
    """Number of responses per evaluation problem."""
    eval_temperature: float = 1.0
    """Temperature of evaluation responses; 0 is greedy decoding."""
    eval_top_p: float = 1.0
    """Nucleus of evaluation responses."""
    save_every: int = 50
    """Steps between checkpoints, and so the maximum number that a killed run repeats."""
    save_batch_every: int = 50
    """Steps between saved batches (batches/*.safetensors)."""
    start_checks: bool = True
    """Run the inexpensive checks of `opd doctor` before the first step and stop if one fails
    (opd.training.checks.start)."""
    rescore_every: int = 50
    """Steps between checks that score a few responses again, alone and without padding; also in the
    first three steps. 0 disables them."""

    # --- machine --------------------------------------------------------------------------------
    max_tokens_per_microbatch: int = 16384
    """Padded tokens (prompt and response) per forward and backward pass; no effect on results."""
    max_logits_per_chunk: int = 1 << 24
    """Logits (tokens x vocabulary) that are held in memory at once."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if available."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of both networks; bfloat16 weights have float32 master weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Review it first."""
    sharding: Literal["none", "full"] = "none"
    """With several processes (torchrun). "none": every process holds the complete student; "full":
    weights, gradients and optimizer states are sharded in float32 (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    offload_teacher: bool = False
    """Keep the teacher in host memory while it does not score."""
    teacher_weights: Literal["saved", "int8", "nf4"] = "saved"
    """Weights of teachers in this process: as saved, or with layers quantised to 8 or 4 bits by
    bitsandbytes while loading; the LM head and the embeddings are never quantised. On a CPU nf4
    requires layers whose input sizes are multiples of 64."""
    teacher_timeout: float = 900.0
    """Seconds to wait for a teacher server that does not respond; then the run stops, and the same
    command resumes it."""
    teacher_concurrency: int = 8
    """Concurrent requests to a teacher server."""
    rollout_timeout: float = 900.0
    """Seconds to wait for a rollout server that does not respond."""
    rollout_concurrency: int = 64
    """Concurrent requests to each rollout server."""

    def __post_init__(self) -> None:
        raise_problems(list(address_problems(self)))  # first: other messages may quote an address
        problems = list(field_problems(self, RANGES))
        raise_problems(problems or list(conflicts(self)))


_NAMES_BY_RANGE = {
    "at least 1": "support_k full_metrics_every max_prompt max_response prompts_per_step "
    "group_size updates_per_batch generation_batch_size max_turns teacher_concurrency "
    "rollout_concurrency eval_problems eval_samples max_tokens_per_microbatch max_logits_per_chunk",
    "not negative": "steps warmup eval_every save_every save_batch_every weight_decay lora_rank "
    "history_turns rollout_lag probe_every rescore_every eval_temperature reward_weight seed",
    "positive": "lr max_grad_norm temperature lora_alpha teacher_timeout rollout_timeout "
    "ratio_clip weight ppo_clip.1",
    "in [0, 1]": "gamma ema_decay beta",
    "in (0, 1]": "top_p eval_top_p entropy_top_fraction ppo_clip.0",
    "in [0, 1)": "betas",
    "above 1": "ppo_clip.2",
}
RANGES = {name: words for words, names in _NAMES_BY_RANGE.items() for name in names.split()}
"""Setting (of a run or a task) to its range, a key of `opd.config.validation.RANGE_CHECKS`."""


def address_problems(config: Config) -> Iterator[str]:
    """Check the server addresses of a configuration.

    Args:
        config: The configuration; its types are not checked yet.

    Yields:
        A message without secrets for every invalid address.
    """
    tasks = config.tasks if isinstance(config.tasks, tuple) else ()
    teachers = [config.teacher, *(getattr(task, "teacher", None) for task in tasks)]
    servers = config.rollout_servers if isinstance(config.rollout_servers, tuple) else ()
    for role, names in (("teacher", teachers), ("rollout", servers)):
        for name in names:
            if isinstance(name, str) and is_url(name) and (problem := address_problem(name, role)):
                yield problem


def conflicts(config: Config) -> Iterator[str]:
    """Check combinations of settings that are each valid by themselves.

    Args:
        config: The configuration.

    Yields:
        A message for every conflict.
    """

    def require(name: str, condition: bool, expected: str) -> Iterator[str]:
        if not condition:
            yield f"{name} is {getattr(config, name)!r}; it must be {expected}"

    servers = config.engine == "servers"
    addresses_expected = "addresses if engine is servers, otherwise ()"
    yield from require(
        "rollout_servers", bool(config.rollout_servers) == servers, addresses_expected
    )
    lag_expected = "0 unless engine is servers, which sample from their own copy of the weights"
    yield from require("rollout_lag", servers or not config.rollout_lag, lag_expected)
    quantised = config.teacher_weights != "saved"
    offload_expected = "saved if offload_teacher is set, which cannot move quantised weights"
    yield from require(
        "teacher_weights", not (config.offload_teacher and quantised), offload_expected
    )
    derived_expected = f"saved if the teacher is derived from the student ({config.teacher})"
    derived = config.teacher in ("base", "ema")
    yield from require("teacher_weights", not (derived and quantised), derived_expected)
    blocks_expected = "() if probe_every is 0"
    yield from require(
        "probe_blocks", bool(config.probe_every or not config.probe_blocks), blocks_expected
    )
    names = [task.name for task in config.tasks]
    if len(set(names)) < len(names):
        yield f"the names of the tasks are {names}; they must be different from each other"
    divisor_expected = f"a divisor of prompts_per_step, {config.prompts_per_step}"
    yield from require(
        "updates_per_batch",
        config.prompts_per_step % config.updates_per_batch == 0,
        divisor_expected,
    )
    masked = bool(config.mask or any(task.mask for task in config.tasks))
    scope_expected = "'cost' without a mask, where 'loss' has no effect"
    yield from require("mask_scope", masked or config.mask_scope == "cost", scope_expected)
    for mask in (config.mask, *(task.mask or () for task in config.tasks)):
        try:
            parse_rules(mask)
        except InvalidInput as error:
            yield str(error)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one error with all problems; do nothing if there are none.

    Args:
        problems: Messages.

    Raises:
        InvalidInput: There are problems.
    """
    if len(problems) > 1:
        raise InvalidInput(f"{len(problems)} settings are invalid: {'. '.join(problems)}")
    if problems:
        raise InvalidInput(problems[0])


def to_json(config: Config) -> dict[str, Any]:
    """Return a configuration as plain JSON data."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(path: str | Path) -> Config:
    """Read the configuration of a run folder's `config.json`.

    Args:
        path: The file; settings may have their former names.

    Returns:
        The configuration.

    Raises:
        InvalidInput: An unknown field, or an invalid value; names the file.
    """
    raw = present_settings(read_object(path))
    known_names = {f.name for f in dataclasses.fields(Config)}
    if unknown := sorted(set(raw) - known_names):
        raise InvalidInput(
            f"{path} has unknown settings {unknown}; it was written by another version"
        )
    check_fields(raw, {"student": str, "teacher": str, "out": str}, str(path))
    tasks = raw.get("tasks", [])
    try:
        if not isinstance(tasks, list):
            raise InvalidInput(f"tasks is {short_repr(tasks)}; it must be a list of objects")
        fields = {name: as_tuple(value) for name, value in raw.items()}
        fields["tasks"] = tuple(task_settings(task) for task in tasks)
        return Config(**fields)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def task_settings(raw: Any) -> TaskSettings:
    """Build the settings of one task from plain data.

    Args:
        raw: A mapping from TOML or JSON.

    Returns:
        The settings.

    Raises:
        InvalidInput: A field is unknown, missing or invalid.
    """
    if not isinstance(raw, Mapping):
        raise InvalidInput(
            f"a task is {short_repr(raw)}; it must be a table of settings, [[tasks]]"
        )
    known_names = {f.name for f in dataclasses.fields(TaskSettings)}
    for name in sorted((set(raw) - known_names) & SETTINGS.keys()):
        raise InvalidInput(f"task {raw.get('name')!r}: {name} has been renamed to {SETTINGS[name]}")
    if unknown := sorted(set(raw) - known_names):
        raise InvalidInput(
            f"task {raw.get('name')!r} has unknown settings {unknown}; known: {sorted(known_names)}"
        )
    if missing_names := sorted({"name", "task"} - raw.keys()):
        raise InvalidInput(f"task {raw.get('name')!r} lacks the settings {missing_names}")
    return TaskSettings(**{name: as_tuple(value) for name, value in raw.items()})


def as_tuple(value: Any) -> Any:
    """Convert a JSON or TOML list to a tuple; return any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value
