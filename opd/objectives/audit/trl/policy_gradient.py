"""TRL's GRPO, GMPO and RLOO, whose reference model is the audit's teacher.

Advantages come from the trainer's own code for rollouts, which is given the audit's responses and
rewards in place of generating and grading. It expects groups of one size; smaller groups are filled
with rows whose reward is NaN, which TRL leaves out of a group's mean and deviation.

Shapes: B responses, T positions, N rows in full groups, V vocabulary.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opd.objectives.audit.trl.stand_ins import bare_trainer, fused_model

ASKS = ("student_logits", "tokens", "mask", "sampler_logp", "reward", "prompt")
"""What these losses ask for, and `teacher_logits` where beta is not 0."""
PROMPT = 1
"""Tokens of a prompt."""


def policy_gradient(kind: type, args: Any, values: dict[str, Any]) -> Tensor:
    """Return the loss of GRPOTrainer, GMPOTrainer or RLOOTrainer.

    With more than one iteration, the rollouts are the sampler's, whose log-probabilities the loss
    reads as those of the older student. With vLLM (GRPO only) they are the engine's, and TRL
    corrects for its difference from the student; nothing is generated, so no engine is needed.

    Args:
        kind: Class of the trainer.
        args: Its configuration.
        values: Value of each of ASKS, and of `teacher_logits`.

    Returns:
        Scalar.
    """
    rollouts = _Rollouts(values)
    trainer = bare_trainer(kind, args, **_settings(args))
    is_older = args.num_iterations > 1 and not args.use_vllm
    trainer.model = _Sampler(rollouts.logp_of(values, is_older=is_older))
    if args.beta:
        teacher = rollouts.place(values["teacher_logits"] * args.temperature)[rollouts.members]
        trainer.ref_model = fused_model(teacher, args.temperature)
    trainer.num_generations = rollouts.size
    trainer.eos_token_ids = range(rollouts.vocabulary)
    trainer._generate = lambda _prompts: rollouts.generate(kind, with_logp=args.use_vllm)
    trainer._calculate_rewards = lambda *_inputs: rollouts.reward[:, None]
    with torch.no_grad():
        batch = trainer._generate_and_score_completions([{"prompt": ""}] * len(rollouts.members))
    batch = rollouts.select(batch)
    student = fused_model(
        rollouts.place(values["student_logits"] * args.temperature), args.temperature
    )
    loss: Tensor = trainer.compute_loss(student, batch)
    return loss


class _Rollouts:
    """The rows of a batch in full groups, each row's supervised tokens first."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Arrange the rows.

        Args:
            values: Value of each of ASKS.
        """
        mask, prompt = values["mask"], values["prompt"]
        self.order = torch.argsort(~mask, dim=1, stable=True)
        self.lengths = mask.sum(1)
        self.vocabulary = values["student_logits"].shape[-1]
        self.tokens = self.place(values["tokens"])
        self.sampler_logp = self.place(values["sampler_logp"])
        groups = [(prompt == index).nonzero()[:, 0] for index in prompt.unique()]
        self.size = max(len(group) for group in groups)
        fillers = [group[:1].expand(self.size - len(group)) for group in groups]
        pairs = zip(groups, fillers, strict=True)
        self.members = torch.cat([x for pair in pairs for x in pair])
        is_filler = torch.cat(
            [torch.arange(self.size) >= len(group) for group in groups],
        )
        self.reward = torch.where(is_filler, torch.nan, values["reward"][self.members])
        self.position = torch.empty_like(prompt)
        self.position[self.members[~is_filler]] = (~is_filler).nonzero()[:, 0]

    def place(self, values: Tensor) -> Tensor:
        """Return (B, T, ...) values with the supervised positions of each row first."""
        index = self.order.reshape(*self.order.shape, *(1,) * (values.dim() - 2))
        return values.gather(1, index.expand_as(values))

    def logp_of(self, values: dict[str, Any], *, is_older: bool) -> Tensor:
        """Return (N, T) the log-probabilities of the student at the time of the rollouts."""
        if is_older:
            return self.sampler_logp[self.members]
        logp = values["student_logits"].detach().log_softmax(-1)
        logp = logp.gather(-1, values["tokens"][..., None])[..., 0]
        return self.place(logp)[self.members]

    def generate(self, kind: type, *, with_logp: bool) -> tuple[Any, ...]:
        """Return what the trainer's generation returns: prompts, responses, the sampler's scores.

        A response without supervised tokens does not end with an EOS, so that TRL masks it as it
        masks truncated ones; every id of the vocabulary counts as an EOS.

        Args:
            kind: Class of the trainer.
            with_logp: Whether the sampler's log-probabilities are returned.

        Returns:
            Ids of prompts and of responses, and what follows them.
        """
        prompts = [[0] * PROMPT for _ in self.members]
        lengths = self.lengths[self.members].tolist()
        pairs = zip(self.tokens[self.members], lengths, strict=True)
        responses = [row[:length].tolist() or [self.vocabulary] for row, length in pairs]
        logp = None
        if with_logp:
            scored = zip(self.sampler_logp[self.members], lengths, strict=True)
            logp = [row[:length].tolist() or [0.0] for row, length in scored]
        texts = [""] * len(prompts)
        if kind.__name__ == "RLOOTrainer":
            return prompts, responses, texts
        return prompts, responses, None, texts, logp, {}, None, []

    def select(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of the B rows, padded to T as after a split of a longer one.

        Args:
            batch: The trainer's batch of N rows.

        Returns:
            The batch of B rows.
        """
        width, sampled_width = self.tokens.shape[1], batch["completion_ids"].shape[1]
        selected = {}
        for name, value in batch.items():
            rows = value[self.position] if value.dim() else self.lengths.sum()
            if rows.dim() == 2 and rows.shape[1] == sampled_width and "prompt" not in name:
                rows = nn.functional.pad(rows, (0, width - rows.shape[1]))
            selected[name] = rows
        selected["completion_ids"] = self.tokens
        is_inside = torch.arange(width) < self.lengths[:, None]
        selected["completion_mask"] = is_inside.long()
        return selected


class _Sampler(nn.Module):
    """The student at the time of the rollouts, of which TRL reads log-probabilities only."""

    is_gradient_checkpointing = False
    """Asked for by TRL."""

    def __init__(self, logp: Tensor) -> None:
        """Keep (N, T) log-probabilities."""
        super().__init__()
        self.logp = logp

    def forward(self, input_ids: Tensor, **_inputs: Any) -> SimpleNamespace:
        """Return the log-probabilities of the responses."""
        return SimpleNamespace(log_probs=self.logp[:, : input_ids.shape[1] - PROMPT])


def _settings(args: Any) -> dict[str, Any]:
    """Return the attributes that the trainers make of their configuration."""
    names = [
        *("beta", "temperature", "num_iterations", "loss_type", "importance_sampling_level"),
        *("off_policy_mask_threshold", "top_entropy_quantile", "entropy_coef", "scale_rewards"),
        *("use_adaptive_entropy", "multi_objective_aggregation", "max_completion_length"),
        *("normalize_advantages", "reward_clip_range", "chat_template_kwargs", "use_vllm"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
        *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
    ]
    weights = [1.0] if args.reward_weights is None else args.reward_weights
    args.per_device_train_batch_size = 10**6
    has_upper = args.epsilon_high is not None
    return {name: vars(args)[name] for name in names if name in vars(args)} | {
        "epsilon_low": args.epsilon,
        "epsilon_high": args.epsilon_high if has_upper else args.epsilon,
        "_entropy_bonus_enabled": vars(args).get("entropy_coef", 0.0) != 0.0,
        "reward_weights": torch.tensor(weights, dtype=torch.float64),
        "reward_funcs": [None],
        "reward_func_names": ["reward"],
        "aux_loss_enabled": False,
        "mask_truncated_completions": True,
        "pad_to_multiple_of": None,
        "tools": None,
        "environments": None,
        "environment_factories": None,
        "log_multimodal": False,
        "ref_model": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_logs": defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }
