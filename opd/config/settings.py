"""The settings of a training run: one frozen dataclass, saved as `config.json` in the run folder.

Free of torch, so that the command line answers quickly.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diagnostics.errors import InvalidInput
from diagnostics.io.files import check_fields, read_object, short
from diagnostics.records.renamed import SETTINGS, present_settings
from opd.config.validation import wrong_fields
from opd.serving.addresses import address_problem, is_url
from opd.tokens.mask_rules import parse

TRUST = "run the Python code that lies beside the weights of a model; read it before"
"""Help of the option --trust-remote-code."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """One of several tasks of a run; what is None is as the run's own setting of that name."""

    name: str
    """How rows and evaluations call it."""
    task: str
    weight: float = 1.0
    """Its share of the steps, or of the prompts of every step: see `Config.task_order`."""
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
        problems = [f"task {self.name!r}: {x}" for x in wrong_fields(self, RANGES)]
        refuse(problems or ([] if self.name else ["name of a task is ''; it must be some text"]))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of `opd train`; a recipe is a function that returns one."""

    student: str
    """Hugging Face causal LM to train: a folder or a hub name."""
    teacher: str
    """Causal LM with the same vocabulary, frozen: a folder or a hub name; or "base", the student
    with its LoRA adapters off; or "ema", a moving average of the student; or the address of a
    vLLM server, http://HOST:PORT/v1 (opd.teachers.client)."""
    out: str
    """Run folder; an unfinished run in it is resumed."""

    # --- data -----------------------------------------------------------------------------------
    task: str = "lab"
    """Where prompts come from: "lab", a .jsonl, .json or .parquet file, a folder, hf:NAME:SPLIT
    (opd.data.sources), one by name, such as dapo-math, math-500, aime24, gsm8k:PATH or gym:TASK
    (opd.data.benchmarks), or games played in text: env:household, env:alfworld, env:MODULE:FUNCTION
    (opd.envs.task)."""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    grader: str = ""
    """exact, numeric, math, gym or lab (opd.data.grading.graders), or a function of (response, answer) of your
    own that returns a number, MODULE:FUNCTION or FILE.py:FUNCTION; empty: the task's, or exact."""
    system: str = ""
    """A system message before every prompt."""
    max_prompt: int = 512
    """Longest prompt in tokens; longer ones are an error. An episode of games ends before one."""
    skip_long_prompts: bool = False
    """Leave longer prompts out instead, and say how many."""
    prompts_per_step: int = 16
    """Distinct prompts whose rollouts make one step."""
    group_size: int = 4
    """Responses to each prompt."""
    tasks: Annotated[tuple[TaskSettings, ...], tyro.conf.Suppress] = ()
    """Several tasks, each with a teacher of its own; on the command line a file, --tasks FILE.toml
    (opd.training.multitask). `task` and `teacher` are then those of tasks that name none."""
    task_order: Literal["alternate", "weighted", "mixed"] = "alternate"
    """Of several tasks, --tasks FILE.toml: one after the other, a step each; one a step, drawn by
    weight; or all in every step, which shares its prompts by weight."""

    # --- rollouts -------------------------------------------------------------------------------
    engine: Literal["hf", "vllm", "servers"] = "hf"
    """Who samples: `generate`; a colocated vLLM (extra vllm) that gets the weights each step; or
    vLLM servers that do, `rollout_servers` (docs/servers.md)."""
    rollout_servers: tuple[str, ...] = ()
    """Addresses of the engine servers, http://HOST:PORT/v1 each."""
    weights_folder: str = ""
    """Folder in which those servers find the weights; empty: weights/ in the run folder."""
    rollout_lag: int = 0
    """Steps by which the engine servers samples ahead, while the update is made: rollouts are that
    many steps old, and never older. 0 is on-policy; 1 overlaps sampling with everything else."""
    temperature: float = 1.0
    """Temperature of rollouts and of both models in the loss."""
    top_p: float = 1.0
    """Nucleus of the rollouts; the loss uses the whole softmax."""
    max_response: int = 512
    """Budget of a response in tokens; of games, of each turn's."""
    generation_batch_size: int = 256
    """Rows of one call of the engine hf; their key-value cache must fit."""
    layout: Literal["turns", "trajectory"] = "turns"
    """Of games: every turn a sample, whose prompt is the goal, recent history and the scene; or a
    whole episode as one conversation, in which only the student's words are supervised."""
    max_turns: int = 30
    """Of games: actions of an episode; one that is not over then is unfinished."""
    history_turns: int = 2
    """Of games: turns that a prompt of layout "turns" tells."""

    # --- objective ------------------------------------------------------------------------------
    objective: str = "teacher_topk"
    """Name in opd.objectives.factory.OBJECTIVES."""
    gamma: float = 0.0
    """Discount of future costs, for objectives with a score-function part."""
    beta: float | None = None
    """Of full_jsd: 0 forward KL, 1 reverse KL."""
    support_k: int = 16
    """K, the number of ids a position for diagnostics and support objectives."""
    baseline: str = "none"
    """Name in opd.objectives.credit.BASELINES: what a credit is compared with, such as leave_one_out, the mean
    of the prompt's other responses, or position_mean, that of the other prompts' responses."""
    ratio: str = "none"
    """Name in opd.objectives.credit.RATIOS: student over sampler."""
    ratio_clip: float | None = None
    """Nats within which log-ratios are held: sampled costs, and those of a reverse KL."""
    ppo_clip: tuple[float, float, float] | None = None
    """Lower, upper and dual clip of sampled_token_clipped; 0.2, 0.2, 3 if not given."""
    reward_weight: float = 0.0
    """Weight of the graded reward beside the divergence."""
    reward_baseline: str = "leave_one_out"
    """Of the reward, a name in opd.objectives.credit.ADVANTAGES."""
    entropy_top_fraction: float = 1.0
    """Share of the tokens, those of the largest student entropy, that the loss is taken over. Of
    entropies within 1e-4 nats of the last one, the earlier prompts' and positions' are kept."""
    denominator: str = "token_mean"
    """Name in opd.objectives.reduction.DENOMINATORS."""
    mask: tuple[str, ...] = ()
    """Rules of tokens that are not supervised, such as role:eos, string:<think>:first or paper
    (opd.tokens.mask_rules)."""
    mask_scope: Literal["cost", "loss"] = "cost"
    """What a mask takes away where a credit counts later costs, or a baseline those of others:
    "cost", the masked tokens' costs from every credit, so that a tag of tens of nats teaches
    nothing (estimates the gradient of the supervised tokens' costs); or "loss", the masked tokens'
    own loss alone, as in the published code (estimates that of all tokens' costs). In both a masked
    token advances gamma and stays in the sequence ratio."""
    map_eos: bool = False
    """Read the teacher at its own end token where the student used another (opd.tokens.masking)."""
    allow_collapse: bool = False
    """Train with an un-normalised support all the same."""
    allow_unweighted: bool = False
    """With several updates, or rollouts ahead, take an older student's tokens for the present one's
    all the same, without an importance weight (the paper's V2 to V5)."""

    # --- optimizer ------------------------------------------------------------------------------
    steps: int = 100
    """Steps, each on fresh rollouts."""
    updates_per_batch: int = 1
    """Optimizer steps on the rollouts of a step, each on its share of the prompts."""
    lr: float = 1e-5
    """Largest AdamW learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine that is 0 in the step after the last."""
    warmup: int = 0
    """Steps of linear warm-up: 1/(warmup + 1) of the rate, 2/(warmup + 1), ..., then all of it."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    """Largest gradient norm."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the linear layers (extra lora); 0 trains every weight."""
    lora_alpha: float = 32.0
    """Scale of the adapters, over the rank."""
    ema_decay: float = 0.99
    """Of the teacher "ema", once an optimizer step."""
    seed: int = 0

    # --- record ---------------------------------------------------------------------------------
    loggers: tuple[str, ...] = ()
    """Besides rows.jsonl: tensorboard, wandb, trackio (extras of these names)."""
    full_metrics_every: int = 1
    """Steps between measurements on whole next-token distributions (exact KL, entropies, ranks) if
    the objective does not need the student's; between them the top-K and the sampled tokens tell
    what they can."""
    probe_every: int = 0
    """Steps between gradient probes (opd.training.gradient_probe): signal, noise and bias of the head's gradient;
    0 for none. With top_p below 1 a probe samples rollouts of its own."""
    probe_blocks: tuple[str, ...] = ()
    """Layers whose gradients the probe measures besides the head's, by shell patterns of their
    names, such as "*norm" or "model.layers.3.mlp.down_proj"; 4 to 6 backward passes a probe."""
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only at the start and the end."""
    eval_task: str = ""
    """Source of the evaluation's problems; empty: a held-out tenth of `task`."""
    eval_prompt_column: str = "prompt"
    eval_answer_column: str = "answer"
    eval_problems: int = 256
    """Held-out problems of an evaluation."""
    eval_samples: int = 1
    """Responses to each of them."""
    eval_temperature: float = 1.0
    """0 is greedy."""
    eval_top_p: float = 1.0
    save_every: int = 50
    """Steps between checkpoints; a killed run repeats at most this many."""
    save_batch_every: int = 50
    """Steps between saved batches (batches/*.safetensors)."""
    start_checks: bool = True
    """Before the first step, ask both models and the data what `opd doctor` can ask cheaply, and
    refuse to train on what is wrong (opd.training.checks.start)."""
    rescore_every: int = 50
    """Steps between checks that score a few responses again, alone and without padding, and in the
    first three steps; 0 for none."""

    # --- machine --------------------------------------------------------------------------------
    max_tokens_per_microbatch: int = 16384
    """Padded tokens (prompt and response) of one forward and backward; changes no result."""
    max_logits_per_chunk: int = 1 << 24
    """Logits held at once: tokens x vocabulary of one chunk."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of both networks; bfloat16 weights have float32 masters."""
    trust_remote_code: bool = False
    """Run the Python code that lies beside a model's weights. Never without reading it."""
    sharding: Literal["none", "full"] = "none"
    """Of several processes (torchrun): each keeps the student whole, or a part of its weights,
    gradients and moments, float32 (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass."""
    offload_teacher: bool = False
    """Keep the teacher in host memory except while it scores."""
    teacher_weights: Literal["saved", "int8", "nf4"] = "saved"
    """Of teachers in this process: as they were saved, or layers quantised while they load to 8 or
    4 bits a weight, by bitsandbytes; head and embeddings never are. On a CPU nf4 wants layers whose
    inputs are multiples of 64."""
    teacher_timeout: float = 900.0
    """Of a teacher on a server: seconds to wait while it does not answer; then the run stops, and
    the same command resumes it."""
    teacher_concurrency: int = 8
    """Of a teacher on a server: requests that it has at once."""
    rollout_timeout: float = 900.0
    """Of the engine servers: seconds to wait for one that does not answer."""
    rollout_concurrency: int = 64
    """Of the engine servers: responses that each samples at once."""

    def __post_init__(self) -> None:
        refuse(list(address_problems(self)))  # before a message or a record can show a secret
        problems = list(wrong_fields(self, RANGES))
        refuse(problems or list(contradictions(self)))


_NAMES_BY_RANGE = {
    "at least 1": "support_k full_metrics_every max_prompt max_response prompts_per_step group_size "
    "updates_per_batch generation_batch_size max_turns teacher_concurrency rollout_concurrency eval_problems eval_samples "
    "max_tokens_per_microbatch max_logits_per_chunk",
    "not negative": "steps warmup eval_every save_every save_batch_every weight_decay lora_rank history_turns "
    "rollout_lag probe_every rescore_every eval_temperature reward_weight seed",
    "positive": "lr max_grad_norm temperature lora_alpha teacher_timeout rollout_timeout ratio_clip "
    "weight ppo_clip.1",
    "in [0, 1]": "gamma ema_decay beta",
    "in (0, 1]": "top_p eval_top_p entropy_top_fraction ppo_clip.0",
    "in [0, 1)": "betas",
    "above 1": "ppo_clip.2",
}
RANGES = {name: words for words, names in _NAMES_BY_RANGE.items() for name in names.split()}
"""Ranges of the numbers, keys of `opd.config.validation.WITHIN`; of a task's own settings too."""


def address_problems(config: Config) -> Iterator[str]:
    """A message for every address of a server that cannot be used, without its secrets."""
    tasks = config.tasks if isinstance(config.tasks, tuple) else ()
    teachers = [config.teacher, *(getattr(task, "teacher", None) for task in tasks)]
    servers = config.rollout_servers if isinstance(config.rollout_servers, tuple) else ()
    for role, names in (("teacher", teachers), ("rollout", servers)):
        for name in names:
            if isinstance(name, str) and is_url(name) and (problem := address_problem(name, role)):
                yield problem


def contradictions(config: Config) -> Iterator[str]:
    """A message for every pair of settings, each right by itself, that exclude each other."""

    def demand(name: str, holds: bool, expected: str) -> Iterator[str]:
        if not holds:
            yield f"{name} is {getattr(config, name)!r}; it must be {expected}"

    servers = config.engine == "servers"
    addresses = "addresses with the engine servers, () with another"
    yield from demand("rollout_servers", bool(config.rollout_servers) == servers, addresses)
    own_weights = "0 unless the engine servers samples, from weights of its own"
    yield from demand("rollout_lag", servers or not config.rollout_lag, own_weights)
    quantised = config.teacher_weights != "saved"
    moved = "saved where offload_teacher moves them"
    yield from demand("teacher_weights", not (config.offload_teacher and quantised), moved)
    of_student = f"saved where the teacher is made of the student ({config.teacher})"
    own = config.teacher in ("base", "ema")
    yield from demand("teacher_weights", not (own and quantised), of_student)
    unused = "() while probe_every is 0"
    yield from demand("probe_blocks", bool(config.probe_every or not config.probe_blocks), unused)
    names = [task.name for task in config.tasks]
    if len(set(names)) < len(names):
        yield f"names of tasks is {names}; it must be different from each other"
    divisor = f"a divisor of prompts_per_step, {config.prompts_per_step}"
    yield from demand(
        "updates_per_batch", config.prompts_per_step % config.updates_per_batch == 0, divisor
    )
    masked = bool(config.mask or any(task.mask for task in config.tasks))
    without = "'cost' without a mask, where another has no effect"
    yield from demand("mask_scope", masked or config.mask_scope == "cost", without)
    for mask in (config.mask, *(task.mask or () for task in config.tasks)):
        try:
            parse(mask)
        except InvalidInput as error:
            yield str(error)


def refuse(problems: Sequence[str]) -> None:
    """Raise one error about all of the problems, if there are any."""
    if len(problems) > 1:
        raise InvalidInput(f"{len(problems)} settings are wrong: {'. '.join(problems)}")
    if problems:
        raise InvalidInput(problems[0])


def to_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(path: str | Path) -> Config:
    """The configuration of a run folder's `config.json`.

    Raises:
      InvalidInput: an unknown field, or a value that no setting has; names the file.
    """
    raw = present_settings(read_object(path))
    known = {f.name for f in dataclasses.fields(Config)}
    if unknown := sorted(set(raw) - known):
        raise InvalidInput(f"{path} has unknown settings {unknown}; it comes from another version")
    check_fields(raw, {"student": str, "teacher": str, "out": str}, str(path))
    tasks = raw.get("tasks", [])
    try:
        if not isinstance(tasks, list):
            raise InvalidInput(f"tasks is {short(tasks)}; it must be a list of objects")
        fields = {name: as_tuple(value) for name, value in raw.items()}
        fields["tasks"] = tuple(task_settings(task) for task in tasks)
        return Config(**fields)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def task_settings(raw: Any) -> TaskSettings:
    """One task's settings from plain data; unknown ones are an error."""
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"a task is {short(raw)}; it must be a table of settings, [[tasks]]")
    known = {f.name for f in dataclasses.fields(TaskSettings)}
    for name in sorted((set(raw) - known) & SETTINGS.keys()):
        raise InvalidInput(f"task {raw.get('name')!r}: {name} is now called {SETTINGS[name]}")
    if unknown := sorted(set(raw) - known):
        raise InvalidInput(
            f"task {raw.get('name')!r} has unknown settings {unknown}; known: {sorted(known)}"
        )
    if lacking := sorted({"name", "task"} - raw.keys()):
        raise InvalidInput(f"task {raw.get('name')!r} lacks {lacking}")
    return TaskSettings(**{name: as_tuple(value) for name, value in raw.items()})


def as_tuple(value: Any) -> Any:
    """A list of JSON or TOML as the tuple that a setting is; another value as it is."""
    return tuple(value) if isinstance(value, list) else value
