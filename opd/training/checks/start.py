"""What is asked of both models before the first step, cheaply: a few forward passes of short rows.

The findings are those of `opd doctor`. "fail" refuses to train, "warn" is said and training begins;
`Config.start_checks` turns all of it off.

Shapes: B rows, L positions, V vocabulary.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from diagnostics.errors import InvalidInput
from opd.config.settings import Config
from opd.models.contexts import evaluating
from opd.models.lm_head import full_logits
from opd.models.model import CausalLM, bare
from opd.runtime import distributed
from opd.teachers.pair import ModelPair
from opd.training.checks.check_result import TEXTS, CheckResult
from opd.training.checks.expected_loss import rounding
from opd.training.checks.rescoring import LIMIT, model_state
from opd.training.checks.update import chosen

LONGEST, PLACES, IDS, NUMBERS = 24, 3, 16, 256
"""Ids of a row, last positions and most probable ids that are compared, numbers of a weight."""
SAMPLE_TEXTS = (
    *TEXTS,
    "12345 + 6789,00  =\t3.5e-7",
    "Hello World\n\n\n  indented",
    "don't you'll we've it's",
)


def check_start(settings: Sequence[Config], pairs: Sequence[ModelPair]) -> None:
    """Say what is doubtful about the models of a run, and refuse what is wrong.

    Raises:
      ValueError: every check that failed, with what to do.
    """
    findings = [finding for finding in examined(settings, pairs) if finding.verdict != "ok"]
    failed = [finding for finding in findings if finding.verdict == "fail"]
    if failed:
        said = "; ".join(f"{x.item}: {x.found} ({x.advice})" for x in failed)
        raise InvalidInput(f"{said}. To train all the same, set start_checks off")
    for finding in findings:
        if distributed.rank() == 0:
            tqdm.write(f"{finding.item}: {finding.found} ({finding.advice})", file=sys.stderr)


def examined(
    settings: Sequence[Config], pairs: Sequence[ModelPair], teacher_tokenizer: Any = None
) -> list[CheckResult]:
    """All findings about the student and each teacher, one after the other.

    teacher_tokenizer: the teacher's as loaded. Without it the ids of the teacher's file are
    compared with those of the student's, which training uses; how it would cut text is not.
    """
    config, pair = settings[0], pairs[0]
    found = [tokenizer_file("student", config.student, pair.tokenizer), trained(config, pair)]
    found += model_findings("student", config.student, pair.student, pair.tokenizer, config)
    seen: set[str] = set()
    for own, some in zip(settings, pairs, strict=True):
        if some.remote is not None or own.teacher in ("base", "ema") or own.teacher in seen:
            continue
        seen.add(own.teacher)
        loaded, texts = (
            (pair.tokenizer, ())
            if teacher_tokenizer is None
            else (
                teacher_tokenizer,
                SAMPLE_TEXTS,
            )
        )
        found += [tokenizer_file("teacher", own.teacher, loaded, texts), apart(some)]
        found += model_findings("teacher", own.teacher, some.teacher, pair.tokenizer, own)
    return found


def model_findings(
    role: str, name: str, model: CausalLM, tokenizer: Any, config: Config
) -> Iterator[CheckResult]:
    """Findings about one model in memory."""
    yield state(role, model, config)
    if config.teacher_weights == "saved" or role == "student":
        yield saved_weights(role, name, model)
    yield forward(role, model, tokenizer, config)


def tokenizer_file(
    role: str, name: str, tokenizer: Any, texts: Sequence[str] = SAMPLE_TEXTS
) -> CheckResult:
    """Does the loaded tokenizer give the ids that the model's tokenizer.json gives?

    Loading rebuilds a tokenizer by the class that tokenizer_config.json names; where that class is
    another than the file's, text is cut into other pieces.
    """
    from tokenizers import Tokenizer

    item, path = f"{role} tokenizer file", saved_file(name, "tokenizer.json")
    if path is None:
        return CheckResult(item, "ok", "no tokenizer.json to compare with")
    raw = Tokenizer.from_file(str(path))
    raw.no_truncation()
    raw.no_padding()
    written, loaded = raw.get_vocab(), tokenizer.get_vocab()
    differ = sorted(token for token, v in written.items() if loaded.get(token) != v)
    advice = (
        "set tokenizer_class in tokenizer_config.json to the class of the file, such as "
        "PreTrainedTokenizerFast, or use the transformers version that wrote it"
    )
    if differ:
        some = ", ".join(f"{t!r}: {loaded.get(t)} / {written[t]}" for t in differ[:5])
        return CheckResult(
            item,
            "fail",
            f"{len(differ)} tokens have other ids than in {path.name} (loaded / file: {some})",
            advice,
        )
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = raw.encode(text, add_special_tokens=False).ids
        if ids != expected:
            return CheckResult(
                item,
                "fail",
                f"{text!r} is {ids[:8]} as loaded and {expected[:8]} by {path.name}",
                advice,
            )
    return CheckResult(item, "ok", "text has the ids of tokenizer.json")


def saved_file(name: str, file: str) -> Path | None:
    """A file of a model folder, or of a hub model's cache; None where there is none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None


def trained(config: Config, pair: ModelPair) -> CheckResult:
    """Are all of the student's weights trained, where no adapters are?"""
    weights = list(pair.student.network.parameters())
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    share = frozen / max(1, sum(weight.numel() for weight in weights))
    if config.lora_rank or not frozen:
        return CheckResult(
            "trained weights", "ok", f"{1 - share:.1%} of the student's weights train"
        )
    return CheckResult(
        "trained weights",
        "warn",
        f"{share:.1%} of the student's weights are frozen, without adapters",
        "set requires_grad on them, or set lora_rank",
    )


def apart(pair: ModelPair) -> CheckResult:
    """Do student and teacher have weights of their own?"""
    own = {weight.data_ptr() for weight in pair.student.network.parameters() if weight.numel()}
    shared = sum(weight.data_ptr() in own for weight in pair.teacher.network.parameters())
    if not shared:
        return CheckResult("teacher's weights", "ok", "not the student's")
    return CheckResult(
        "teacher's weights",
        "fail",
        f"{shared} of the teacher's tensors are the student's own, and would move with it",
        'load it separately, or set the teacher "base" or "ema"',
    )


def state(role: str, model: CausalLM, config: Config) -> CheckResult:
    """Evaluation mode, and the precision that was asked for."""
    numbers = model_state(role, model, config)
    training, wrong = numbers[f"{role}_training"], numbers[f"{role}_precision"]
    if training:
        return CheckResult(
            f"{role} mode",
            "fail",
            f"{training:.0f} modules are in training mode and drop something out",
            "call eval() on the network before it scores",
            numbers,
        )
    if wrong > 0.5:
        return CheckResult(
            f"{role} mode",
            "fail",
            f"{wrong:.0%} of the weights are in another precision than {config.dtype}",
            "load the model with the asked dtype",
            numbers,
        )
    return CheckResult(f"{role} mode", "ok", f"evaluation, {config.dtype}", "", numbers)


def saved_weights(role: str, name: str, model: CausalLM) -> CheckResult:
    """Are the weights in memory those of the model's safetensors files, rounded once?"""
    item, names = f"{role} weights", files_of(name)
    weights = {
        key.replace(".base_layer", ""): weight
        for key, weight in bare(model.network).named_parameters()
        if weight.is_floating_point()
    }
    common = sorted(weights.keys() & names.keys())
    compared, differ, rounded = 0, list[str](), 0
    for key in [common[i] for i in chosen(len(common))]:
        with safe_open(str(names[key]), framework="pt") as file:
            part = file.get_slice(key)
            if part.get_shape() != list(weights[key].shape):
                continue
            saved = part[:1].flatten()[:NUMBERS].to(weights[key].dtype)
        loaded = weights[key].detach()[:1].flatten()[:NUMBERS].cpu()
        compared += 1
        if not torch.equal(saved.nan_to_num(), loaded.nan_to_num()):
            differ.append(key)
            rounded += torch.equal(saved.bfloat16(), loaded.bfloat16())
    if not differ:
        return CheckResult(item, "ok", f"{compared} tensors as saved")
    how = ", rounded to fewer digits" if rounded == len(differ) else ""
    return CheckResult(
        item,
        "fail",
        f"{len(differ)} of {compared} tensors in memory are not those of the files{how}, first "
        f"{differ[0]}",
        "look for a cast to another precision, keys that were missing and so initialised at "
        "random, or another model",
    )


def files_of(name: str) -> dict[str, Path]:
    """The safetensors file of each tensor of a saved model; empty where there is none."""
    single = saved_file(name, "model.safetensors")
    if single is not None:
        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = saved_file(name, "model.safetensors.index.json")
    if index is None:
        return {}
    names = json.loads(index.read_text())["weight_map"]
    paths = {file: saved_file(name, file) for file in set(names.values())}
    found = {key: paths[file] for key, file in names.items()}
    return {key: path for key, path in found.items() if path is not None}


@torch.no_grad()
def forward(role: str, model: CausalLM, tokenizer: Any, config: Config) -> CheckResult:
    """Does what the model says hang on chance, hidden ids, later ids or padding?"""
    item = f"{role} forward pass"
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    rows = [[v % model.vocabulary for v in ids[:LONGEST]] for ids in texts]
    rows[0] = rows[0][: max(PLACES + 1, len(rows[0]) // 3)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.long)
    for row, some in enumerate(rows):
        ids[row, width - len(some) :] = torch.tensor(some)
        real[row, width - len(some) :] = 1
    ids, real = ids.to(model.device), real.to(model.device)
    unit = rounding(config)
    plain = answers(model, ids, real)
    again = answers(model, ids, real)
    with evaluating(model.network):
        first = answers(model, ids, real)
        filled = answers(model, torch.where(real == 1, ids, (ids + 7) % model.vocabulary), real)
        alone = answers(model, ids[:1, width - len(rows[0]) :], real[:1, width - len(rows[0]) :])
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 7) % model.vocabulary
        later = answers(model, changed, real)
    numbers = {
        "chance": largest_gap(plain, again) / unit,
        "mask": largest_gap(first, filled) / unit,
        "later": largest_gap(first[:, :-1], later[:, :-1]) / unit,
        "padding": largest_gap(first[:1], alone) / unit,
    }
    if not bool(plain.isfinite().all()):
        advice = "its weights are damaged or diverged: load an earlier checkpoint"
        return CheckResult(item, "fail", "log-probabilities are not finite", advice, numbers)
    for name, found, advice in FORWARD:
        if not numbers[name] <= LIMIT:
            said = f"{found}, by {numbers[name] * unit:.2g} nats, {LIMIT * unit:.1g} is rounding"
            return CheckResult(item, "fail", said, advice, numbers)
    return CheckResult(item, "ok", "hangs on the row's own text alone", "", numbers)


FORWARD = (
    (
        "chance",
        "the same rows twice give other log-probabilities",
        "dropout? call eval() on the network",
    ),
    (
        "mask",
        "ids that the attention mask hides change the log-probabilities: it is ignored",
        "use an attention implementation that takes a mask",
    ),
    (
        "later",
        "later ids change the log-probabilities of earlier ones: the model is not causal",
        "load it as a causal language model",
    ),
    (
        "padding",
        "a row with padding on its left has other log-probabilities than alone",
        "the model must take position_ids and an attention mask",
    ),
)


def answers(model: CausalLM, ids: Tensor, real: Tensor) -> Tensor:
    """(B, PLACES, V) log-probabilities at the last positions of rows padded on the left."""
    positions = (real.cumsum(1) - 1).clamp(min=0)
    states = model.hidden(ids, real, positions)[:, -PLACES:]
    flat = full_logits(states.flatten(0, 1), model.head)
    return flat.log_softmax(-1).unflatten(0, states.shape[:2])


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Largest root mean square over a place's most probable ids; NaN where one is."""
    ids = one.topk(min(IDS, one.shape[-1]), -1).indices
    gap = one.gather(-1, ids) - other.gather(-1, ids)
    return float(gap.double().square().mean(-1).sqrt().amax())
