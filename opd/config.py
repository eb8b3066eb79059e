"""The settings of a training run: one frozen dataclass, saved as `config.json` in the run folder.

Free of torch, so that the command line answers quickly.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of `opd train`; a recipe is a function that returns one."""

    student: str
    """Hugging Face causal LM to train: a folder or a hub name."""
    teacher: str
    """Hugging Face causal LM with the same vocabulary, frozen."""
    out: str
    """Run folder; an unfinished run in it is resumed."""
    task: str = "lab"
    """Where prompts come from: "lab", or a .jsonl/.parquet file with columns prompt and answer."""

    objective: str = "teacher_topk"
    """Name in opd.objectives.OBJECTIVES."""
    gamma: float = 0.0
    """Discount of future costs, for objectives with a score-function part."""
    support_k: int = 16
    """K, the number of teacher ids a position for diagnostics and support objectives."""
    denominator: str = "token_mean"
    """Name in opd.objectives.DENOMINATORS."""

    temperature: float = 1.0
    """Temperature of rollouts and of both models in the loss."""
    top_p: float = 1.0
    """Nucleus of the rollouts; the loss uses the whole softmax."""
    max_prompt: int = 512
    """Longest prompt in tokens; a longer one is an error."""
    max_response: int = 512
    """Budget of a response in tokens."""
    prompts_per_step: int = 16
    """Distinct prompts in an optimizer step."""
    group_size: int = 4
    """Responses to each prompt."""

    steps: int = 100
    """Optimizer steps, each on fresh rollouts."""
    lr: float = 1e-5
    """AdamW learning rate after warm-up."""
    warmup: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0

    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only at the start and the end."""
    eval_problems: int = 256
    """Held-out problems of an evaluation, sampled once each at temperature 1."""
    save_every: int = 50
    """Steps between checkpoints; a killed run repeats at most this many."""
    batch_every: int = 50
    """Steps between saved batches (batches/*.safetensors)."""

    micro_tokens: int = 16384
    """Padded tokens (prompt and response) of one forward and backward."""
    chunk_elements: int = 1 << 24
    """Logits held at once: tokens x vocabulary of one chunk."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""

    def __post_init__(self) -> None:
        for name in ("support_k", "max_prompt", "max_response", "prompts_per_step", "group_size"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "warmup", "eval_every", "save_every", "batch_every", "weight_decay"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "not negative")
        for name in ("lr", "clip", "temperature"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _require("gamma", self.gamma, 0 <= self.gamma <= 1, "in [0, 1]")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _require("eval_problems", self.eval_problems, self.eval_problems >= 1, "at least 1")


def _require(name: str, value: object, ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; it must be {what}")


def to_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(path: str | Path) -> Config:
    """The configuration of a run folder's `config.json`; unknown fields are an error."""
    raw = json.loads(Path(path).read_text())
    known = {f.name for f in dataclasses.fields(Config)}
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"{path} has unknown settings {unknown}; it comes from another version")
    return Config(**{**raw, "betas": tuple(raw["betas"])})
