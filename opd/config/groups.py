"""Groups of settings. The attribute docstrings are the help of the command line.

Every setting has one name, which is unique over all groups: it is the field, the flag, the key in
files and the name in messages.
"""

from dataclasses import dataclass
from typing import Literal

from opd.config.fields import setting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and how many of them a step takes."""

    task: str = setting("lab", per_task=True)
    """Source of the prompts: "lab"; a .jsonl, .json or .parquet file, a folder, or hf:NAME:SPLIT
    (opd.data.sources); a named dataset such as dapo-math, math-500, aime24, gsm8k:PATH or gym:TASK
    (opd.data.benchmarks); or text games, env:household, env:alfworld, env:MODULE:FUNCTION or
    env:FILE.py:FUNCTION (opd.envs.task)."""
    prompt_column: str = setting("prompt", per_task=True)
    """Column with the prompt, text or messages, or a text with columns in braces:
    "{question} Hint: {hint}". Where no row has the column "prompt", "messages" is read."""
    answer_column: str = setting("answer", per_task=True)
    """Column with the reference answer. Empty: responses are not graded."""
    response_column: str = setting("response", per_task=True)
    """Column with the response, for prefixes dataset. Where no row has the column "response", the
    assistant's reply that ends a chat is read."""
    grader: str = setting("", per_task=True)
    """Grader of responses: exact, numeric, math, gym or lab (opd.data.grading.graders), or a
    function of (response, answer) that returns a number, or a number and feedback for the
    teacher's view (teacher_view), as MODULE:FUNCTION or FILE.py:FUNCTION. Empty: the task's own
    grader, or exact."""
    system: str = setting("", per_task=True)
    """System message of every prompt."""
    chat_template: str = ""
    """Jinja file whose text is the chat template, in the place of the student's own."""
    template: str = setting("{}", per_task=True)
    """Arguments of the chat template as JSON, such as {"enable_thinking": false}."""
    max_prompt: int = setting(512, within="at least 1", per_task=True)
    """Maximum prompt length in tokens. Longer prompts are an error; a game episode ends when its
    next prompt would be longer."""
    skip_long_prompts: bool = False
    """Skip prompts longer than max_prompt and report their number, instead of an error."""
    prompts_per_step: int = setting(16, within="at least 1")
    """Number of distinct prompts per step."""
    group_size: int = setting(4, within="at least 1")
    """Number of responses per prompt."""
    task_order: Literal["alternate", "weighted", "mixed"] = "alternate"
    """Order of several tasks. "alternate": one task per step, in turn; "weighted": one task per
    step, drawn by weight; "mixed": all tasks in every step, with prompts in proportion to their
    weights."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled."""

    engine: Literal["hf", "vllm", "servers"] = "hf"
    """Rollout engine. "hf": Hugging Face generate; "vllm": vLLM on the same GPU (extra vllm);
    "servers": the vLLM servers in rollout_servers, which load the weights after every step
    (docs/servers.md)."""
    rollout_lag: int = setting(0, within="not negative")
    """Number of steps that rollout generation may run ahead of training. 0 is on-policy; 1 overlaps
    generation with training. Requires engine=servers."""
    temperature: float = setting(1.0, within="positive")
    """Softmax temperature of rollouts, and of both models in the loss."""
    top_p: float = setting(1.0, within="in (0, 1]")
    """Nucleus of the rollouts. The loss always uses the full softmax."""
    max_response: int = setting(512, within="at least 1", per_task=True)
    """Maximum response length in tokens; for games, of each turn."""
    prefixes: str = "student"
    """Who writes the responses that a step trains on (docs/prefixes.md). "student": the student, as
    on-policy distillation does; "teacher": the teacher, sampled in this process; "dataset": the
    data, in response_column; "mixed:SHARE": the student with this probability and otherwise the
    teacher, "mixed:START-END" with a share that is linear over the steps, and "mixed:SHARE:dataset"
    with the data; "replay:AGE": the student, and AGE further steps are taken on the same
    responses."""
    generation_batch_size: int = setting(256, within="at least 1", resumable=True)
    """Rows per generate call of engine hf; their key-value cache must fit in memory."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective and which tokens it supervises."""

    objective: str = "teacher_topk"
    """Training objective; one of opd.objectives.factory.OBJECTIVES, one without a teacher
    (negative_log_likelihood, reward_only), or a loss of your own,
    MODULE:FUNCTION or FILE.py:FUNCTION (opd.objectives.user_loss), which holds the logits of all
    tokens of an update in memory unless loss_divisor is set."""
    gamma: float = setting(0.0, within="in [0, 1]")
    """Discount factor of future costs, for objectives with a score-function term."""
    beta: float | None = setting(None, within="in [0, 1]")
    """Interpolation of full_jsd: 0 is forward KL, 1 is reverse KL."""
    support_k: int = setting(16, within="at least 1")
    """K, the number of token ids per position in top-K supports and diagnostics."""
    baseline: str = "none"
    """Baseline subtracted from the credit; one of opd.objectives.credit.BASELINES, such as
    leave_one_out (mean of the prompt's other responses) or position_mean (mean over the responses
    to other prompts)."""
    ratio: str = "none"
    """Importance ratio of student to sampler; one of opd.objectives.credit.RATIOS."""
    ratio_clip: float | None = setting(None, within="positive")
    """Clip log-ratios to this many nats, in sampled costs and in reverse KL."""
    ppo_clip: tuple[float, float, float] | None = setting(
        None, within=("in (0, 1]", "positive", "above 1")
    )
    """Lower, upper and dual clip of sampled_token_clipped; default 0.2, 0.2, 3."""
    reward_weight: float = setting(0.0, within="not negative")
    """Weight of the graded reward, added to the distillation objective; for reward_only the whole
    objective."""
    reward_baseline: str = "leave_one_out"
    """Baseline of the reward; one of opd.objectives.credit.ADVANTAGES."""
    entropy_top_fraction: float = setting(1.0, within="in (0, 1]")
    """Fraction of tokens with the highest student entropy that enter the loss. Ties (within 1e-4
    nats of the threshold) are resolved in favour of earlier prompts and positions."""
    denominator: str = "token_mean"
    """Normalisation of the loss; one of opd.objectives.reduction.DENOMINATORS."""
    mask: tuple[str, ...] = setting((), per_task=True)
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
    loss_divisor: Literal["update", "one", "tokens", "rows", "prompts"] = "update"
    """For a loss of your own: what it divides the sum over its rows by (one: nothing), so that an
    update can be split into micro-batches and over processes; "update": it sees the whole update.
    Checked before the run."""
    allow_faulty_loss: bool = False
    """Train with a loss of your own that `opd audit` calls faulty."""
    allow_unweighted: bool = False
    """With several updates per batch, rollout_lag or prefixes of another policy, train on responses
    that the student did not sample without importance weights (variants V2 to V5 of the paper)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning rate and trained parameters."""

    updates_per_batch: int = setting(1, within="at least 1")
    """Optimizer steps per batch of rollouts, each on a part of the prompts."""
    lr: float = setting(1e-5, within="positive")
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine that reaches 0 one step after the
    last."""
    warmup: int = setting(0, within="not negative")
    """Steps of linear warm-up: 1/(warmup + 1) of the learning rate, 2/(warmup + 1), ..., 1."""
    weight_decay: float = setting(0.0, within="not negative")
    """Weight decay of AdamW."""
    betas: tuple[float, float] = setting((0.9, 0.999), within="in [0, 1)")
    """Betas of AdamW."""
    max_grad_norm: float = setting(1.0, within="positive")
    """Gradient norm above which gradients are clipped."""
    lora_rank: int = setting(0, within="not negative")
    """Rank of LoRA adapters on the linear layers (extra lora); 0 trains all weights."""
    lora_alpha: float = setting(32.0, within="positive")
    """LoRA alpha; the adapters are scaled by alpha / rank."""
    ema_decay: float = setting(0.99, within="in [0, 1]")
    """Decay of teacher "ema" per optimizer step."""
    ema_resync_every: int = setting(0, within="not negative")
    """Steps between copies of the student's weights to teacher "ema"; 0 copies them at the start
    only."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out problems, during a run and in `opd eval`."""

    eval_task: str = setting("", per_task=True)
    """Source of the evaluation problems. Empty: a held-out tenth of `task`."""
    eval_prompt_column: str = setting("prompt", per_task=True)
    """Column of eval_task with the prompt."""
    eval_answer_column: str = setting("answer", per_task=True)
    """Column of eval_task with the reference answer."""
    eval_problems: int = setting(256, within="at least 1", per_task=True)
    """Number of held-out problems per evaluation."""
    eval_samples: int = setting(1, within="at least 1")
    """Number of responses per evaluation problem."""
    eval_temperature: float = setting(1.0, within="not negative")
    """Temperature of evaluation responses; 0 is greedy decoding."""
    eval_top_p: float = setting(1.0, within="in (0, 1]")
    """Nucleus of evaluation responses."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What a run computes and stores about itself, and how often."""

    loggers: tuple[str, ...] = setting((), resumable=True)
    """Loggers in addition to rows.jsonl: tensorboard, wandb, trackio (extras of these names)."""
    metrics: tuple[str, ...] = setting((), resumable=True)
    """Metrics of your own in every row, MODULE:FUNCTION or FILE.py:FUNCTION
    (opd.training.user_metrics)."""
    logger_columns: Literal["headline", "all"] = setting("headline", resumable=True)
    """What loggers get of a row: the headline columns (diagnostics.records.headline) or all; the
    file rows.jsonl always has all."""
    full_metrics_every: int = setting(1, within="at least 1")
    """Steps between full-vocabulary metrics (exact KL, entropies, ranks), if the objective does not
    need the student's full distribution. Other steps compute top-K and sampled-token metrics
    only."""
    probe_every: int = setting(0, within="not negative", resumable=True)
    """Steps between gradient probes (opd.training.probe.gradient_probe), which measure signal,
    noise and bias of the LM head's gradient; 0 disables them. With top_p below 1, or prefixes other
    than student, a probe samples its own rollouts."""
    probe_blocks: tuple[str, ...] = ()
    """Further layers whose gradients the probe measures, as shell patterns of their names, such as
    "*norm" or "model.layers.3.mlp.down_proj"; costs 4 to 6 backward passes per probe."""
    eval_every: int = setting(50, within="not negative", resumable=True)
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    save_every: int = setting(50, within="not negative", resumable=True)
    """Steps between checkpoints, and so the maximum number that a killed run repeats."""
    save_batch_every: int = setting(50, within="not negative", resumable=True)
    """Steps between saved batches (batches/*.safetensors)."""
    start_checks: bool = setting(True, resumable=True)
    """Run the inexpensive checks of `opd doctor` before the first step and stop if one fails
    (opd.training.checks.start)."""
    rescore_every: int = setting(50, within="not negative", resumable=True)
    """Steps between checks that score a few responses again, alone and without padding; also in the
    first three steps. 0 disables them."""


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Devices, data types and memory."""

    max_tokens_per_microbatch: int = setting(16384, within="at least 1", resumable=True)
    """Padded tokens (prompt and response) per forward and backward pass; no effect on results."""
    max_logits_per_chunk: int = setting(1 << 24, within="at least 1", resumable=True)
    """Logits (tokens x vocabulary) that are held in memory at once."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda if available."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of both networks; bfloat16 weights have float32 master weights."""
    trust_remote_code: bool = setting(False, resumable=True)
    """Run Python code that comes with a model. Review it first."""
    sharding: Literal["none", "full"] = setting("none", resumable=True)
    """With several processes (torchrun). "none": every process holds the complete student; "full":
    weights, gradients and optimizer states are sharded in float32 (FSDP2)."""
    gradient_checkpointing: bool = setting(False, resumable=True)
    """Recompute activations in the backward pass to save memory."""
    offload_teacher: bool = setting(False, resumable=True)
    """Keep the teacher in host memory while it does not score."""
    share_forward_pass: bool = setting(True, resumable=True)
    """Compute scores and gradient of a micro-batch from one forward pass of the student, where a
    response's loss needs no other response (`opd.training.shared_pass`)."""
    teacher_weights: Literal["saved", "int8", "nf4"] = "saved"
    """Weights of teachers in this process: as saved, or with layers quantised to 8 or 4 bits by
    bitsandbytes while loading; the LM head and the embeddings are never quantised. On a CPU nf4
    requires layers whose input sizes are multiples of 64."""


@dataclass(frozen=True, kw_only=True)
class RemoteTeacherConfig:
    """Requests to teachers on servers."""

    teacher_timeout: float = setting(900.0, within="positive", resumable=True)
    """Seconds to wait for a teacher server that does not respond; then the run stops, and the same
    command resumes it."""
    teacher_concurrency: int = setting(8, within="at least 1", resumable=True)
    """Concurrent requests to a teacher server."""
    teacher_eos: tuple[int, ...] = setting((), within="not negative", per_task=True)
    """Ids that end a response of a teacher on a server, its tokenizer's own first, for map_eos; a
    server does not say them."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What the teacher reads in the place of the student's prompt (docs/teacher-view.md)."""

    teacher_view: str = setting("", per_task=True)
    """Jinja file with the user's message that the teacher reads. It may use prompt, messages,
    answer, solution, columns of the data, response, reward, feedback, peers, and in games goal,
    observation and turns (opd.data.teacher_view). Empty: the teacher reads the student's prompt."""
    teacher_system: str = setting("", per_task=True)
    """System message that only the teacher reads, in the place of the student's."""
    teacher_template: str = setting("student", per_task=True)
    """Chat template of the teacher's prompts. "student": the student's; "own": that of the
    teacher's folder; or a Jinja file."""
    teacher_thinking: Literal["same", "on", "off"] = setting("same", per_task=True)
    """Argument enable_thinking of the teacher's chat template; "same": as for the student."""
    view_control: Literal["none", "other_problem", "empty", "shuffled"] = setting(
        "none", per_task=True
    )
    """Control experiments of teacher_view. "other_problem": answer, solution and columns of another
    problem, the same one in every epoch; "empty": nothing beside the prompt; "shuffled": what is
    shown, with its words in random order."""
    max_teacher_prompt: int = setting(0, within="not negative", per_task=True)
    """Maximum length of the teacher's prompts in tokens; longer ones are an error. 0: as long as
    prompt and response fit into the teacher's context."""
    view_metrics_every: int = setting(10, within="not negative", resumable=True)
    """Steps between measurements of what the teacher's own prompts change, which cost two further
    passes of the teacher (view/kl, view/signal_share); 0 disables them."""


@dataclass(frozen=True, kw_only=True)
class RolloutServersConfig:
    """vLLM servers that generate the rollouts of engine "servers"."""

    rollout_servers: tuple[str, ...] = setting((), resumable=True, address="rollout")
    """Addresses of the rollout servers, each http://HOST:PORT/v1."""
    weights_folder: str = setting("", resumable=True)
    """Folder through which the servers load the weights. Empty: weights/ in the run folder."""
    rollout_timeout: float = setting(900.0, within="positive", resumable=True)
    """Seconds to wait for a rollout server that does not respond."""
    rollout_concurrency: int = setting(64, within="at least 1", resumable=True)
    """Concurrent requests to each rollout server."""


@dataclass(frozen=True, kw_only=True)
class GamesConfig:
    """Episodes of text games, tasks env:NAME."""

    layout: Literal["turns", "trajectory"] = setting("turns", per_task=True)
    """Rows of game episodes. "turns": one row per turn, whose prompt has the goal, recent history
    and the observation; "trajectory": one row per episode as a conversation, in which only the
    student's responses are supervised."""
    max_turns: int = setting(30, within="at least 1", per_task=True)
    """Maximum number of actions in a game episode."""
    history_turns: int = setting(2, within="not negative", per_task=True)
    """Number of previous turns in a game prompt of layout "turns"."""
