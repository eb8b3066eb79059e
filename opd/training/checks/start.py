"""Checks of both models before the first step: a few forward passes of short sequences.

`opd doctor` reports the same results. A "fail" stops the run, a "warn" is printed; set
`Config.start_checks` to False to skip all of them.

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
from diagnostics.ragged import left_pad
from opd.config.settings import Config
from opd.models.contexts import evaluation_mode
from opd.models.loading import OBJECT_PREFIX
from opd.models.model import CausalLM, base_model
from opd.runtime import distributed
from opd.teachers.pair import ModelPair
from opd.training.checks.check_result import TEXTS, CheckResult
from opd.training.checks.expected_loss import ROUNDING, rounding_unit
from opd.training.checks.rescoring import MAX_ROUNDING_UNITS, model_state
from opd.training.checks.update import sampled_indices

MAX_IDS, NUM_POSITIONS, NUM_IDS, NUM_ELEMENTS = 24, 3, 16, 256
"""Numbers of token ids per row, last positions, most likely ids, and elements of a weight."""
SAMPLE_TEXTS = (
    *TEXTS,
    "12345 + 6789,00  =\t3.5e-7",
    "Hello World\n\n\n  indented",
    "don't you'll we've it's",
)
"""Texts that tokenizers of different types split differently."""


def check_start(settings: Sequence[Config], pairs: Sequence[ModelPair]) -> None:
    """Print warnings about the models of a run, and refuse to train if a check fails.

    Args:
        settings: Settings of each task.
        pairs: Student and teacher of each task.

    Raises:
        InvalidInput: A check failed; the message lists all failures with their remedies.
    """
    results = [result for result in check_models(settings, pairs) if result.verdict != "ok"]
    failed = [result for result in results if result.verdict == "fail"]
    if failed:
        details = "; ".join(f"{result.item}: {result.found} ({result.advice})" for result in failed)
        raise InvalidInput(f"{details}. To train anyway, set start_checks to False")
    for result in results:
        if distributed.rank() == 0:
            tqdm.write(f"{result.item}: {result.found} ({result.advice})", file=sys.stderr)


def check_models(
    settings: Sequence[Config], pairs: Sequence[ModelPair], teacher_tokenizer: Any = None
) -> list[CheckResult]:
    """Run all checks of the student and of each distinct teacher.

    Args:
        settings: Settings of each task.
        pairs: Student and teacher of each task.
        teacher_tokenizer: Tokenizer of the teacher. Without it, the teacher's tokenizer file is
            compared with the student's tokenizer, which training uses, by vocabulary only.

    Returns:
        The results, in order.
    """
    config, pair = settings[0], pairs[0]
    results = [
        check_tokenizer_file("student", config.student, pair.tokenizer),
        check_trainable_weights(config, pair),
    ]
    results += check_model("student", config.student, pair.student, pair.tokenizer, config)
    seen_teachers: set[str] = set()
    for task_config, task_pair in zip(settings, pairs, strict=True):
        if not task_pair.teacher.is_separate or task_config.teacher in seen_teachers:
            continue
        seen_teachers.add(task_config.teacher)
        loaded, texts = (
            (pair.tokenizer, ())
            if teacher_tokenizer is None
            else (
                teacher_tokenizer,
                SAMPLE_TEXTS,
            )
        )
        results += [
            check_tokenizer_file("teacher", task_config.teacher, loaded, texts),
            check_separate_weights(task_pair),
        ]
        teacher = task_pair.teacher
        results += check_model(
            "teacher",
            task_config.teacher,
            teacher.model,
            pair.tokenizer,
            task_config,
            is_quantised=teacher.is_quantised,
        )
    return results


def check_model(
    role: str,
    name: str,
    model: CausalLM,
    tokenizer: Any,
    config: Config,
    is_quantised: bool = False,
) -> Iterator[CheckResult]:
    """Yield the checks of one model in memory."""
    yield check_mode_and_dtype(role, model, config)
    if not is_quantised:
        yield check_saved_weights(role, name, model)
    yield check_forward_pass(role, model, tokenizer, config)


def check_tokenizer_file(
    role: str, name: str, tokenizer: Any, texts: Sequence[str] = SAMPLE_TEXTS
) -> CheckResult:
    """Check that the loaded tokenizer gives the ids of the model's tokenizer.json.

    Loading rebuilds a tokenizer with the class that tokenizer_config.json names; a class that does
    not fit the file splits text differently.

    Args:
        role: "student" or "teacher".
        name: Folder or hub name of the model.
        tokenizer: The loaded tokenizer.
        texts: Texts to encode.

    Returns:
        The result.
    """
    from tokenizers import Tokenizer

    item, path = f"{role} tokenizer file", saved_file(name, "tokenizer.json")
    if path is None:
        return CheckResult(item, "ok", "the model has no tokenizer.json")
    raw = Tokenizer.from_file(str(path))
    raw.no_truncation()
    raw.no_padding()
    file_vocab, loaded_vocab = raw.get_vocab(), tokenizer.get_vocab()
    differ = sorted(
        token for token, token_id in file_vocab.items() if loaded_vocab.get(token) != token_id
    )
    advice = (
        "set tokenizer_class in tokenizer_config.json to the class of the file, such as "
        "PreTrainedTokenizerFast, or use the transformers version that wrote it"
    )
    if differ:
        examples = ", ".join(f"{t!r}: {loaded_vocab.get(t)} / {file_vocab[t]}" for t in differ[:5])
        return CheckResult(
            item,
            "fail",
            f"{len(differ)} tokens have other ids than in {path.name} (loaded / file: {examples})",
            advice,
        )
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = raw.encode(text, add_special_tokens=False).ids
        if ids != expected:
            return CheckResult(
                item,
                "fail",
                f"{text!r} is encoded as {ids[:8]}, but as {expected[:8]} by {path.name}",
                advice,
            )
    return CheckResult(item, "ok", "texts are encoded as by tokenizer.json")


def saved_file(name: str, file: str) -> Path | None:
    """Return a file of a model folder or of the hub cache; None if there is none."""
    if name.startswith(OBJECT_PREFIX):  # a model in memory
        return None
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None


def check_trainable_weights(config: Config, pair: ModelPair) -> CheckResult:
    """Check that all of the student's weights are trainable, unless LoRA is used."""
    weights = list(pair.student.network.parameters())
    frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
    share = frozen / max(1, sum(weight.numel() for weight in weights))
    if config.optimizer.lora_rank or not frozen:
        return CheckResult(
            "trained weights", "ok", f"{1 - share:.1%} of the student's weights are trainable"
        )
    return CheckResult(
        "trained weights",
        "warn",
        f"{share:.1%} of the student's weights are frozen, without adapters",
        "set requires_grad on them, or train adapters (lora_rank)",
    )


def check_separate_weights(pair: ModelPair) -> CheckResult:
    """Check that student and teacher do not share tensors."""
    student_pointers = {
        weight.data_ptr() for weight in pair.student.network.parameters() if weight.numel()
    }
    num_shared = sum(
        weight.data_ptr() in student_pointers for weight in pair.teacher.model.network.parameters()
    )
    if not num_shared:
        return CheckResult("teacher's weights", "ok", "separate from the student's")
    return CheckResult(
        "teacher's weights",
        "fail",
        f"{num_shared} of the teacher's tensors are shared with the student and would be trained",
        'load the teacher separately, or set teacher to "base" or "ema"',
    )


def check_mode_and_dtype(role: str, model: CausalLM, config: Config) -> CheckResult:
    """Check that a model is in evaluation mode and in the configured precision."""
    numbers = model_state(role, model, config.hardware.dtype)
    training, wrong = numbers[f"{role}_training"], numbers[f"{role}_precision"]
    if training:
        return CheckResult(
            f"{role} mode",
            "fail",
            f"{training:.0f} modules with dropout are in training mode",
            "call eval() on the network before it scores",
            numbers,
        )
    if wrong > 0.5:
        return CheckResult(
            f"{role} mode",
            "fail",
            f"{wrong:.0%} of the weights are not in {config.hardware.dtype}",
            "load the model with the configured dtype",
            numbers,
        )
    return CheckResult(f"{role} mode", "ok", f"evaluation, {config.hardware.dtype}", "", numbers)


def check_saved_weights(role: str, name: str, model: CausalLM) -> CheckResult:
    """Check that the weights in memory are those of the model's safetensors files, rounded once."""
    item, names = f"{role} weights", tensor_files(name)
    weights = {
        key.replace(".base_layer", ""): weight
        for key, weight in base_model(model.network).named_parameters()
        if weight.is_floating_point()
    }
    common = sorted(weights.keys() & names.keys())
    num_compared, differing, num_rounded = 0, list[str](), 0
    for key in [common[i] for i in sampled_indices(len(common))]:
        with safe_open(str(names[key]), framework="pt") as file:
            part = file.get_slice(key)
            if part.get_shape() != list(weights[key].shape):
                continue
            saved = part[:1].flatten()[:NUM_ELEMENTS].to(weights[key].dtype)
        loaded = weights[key].detach()[:1].flatten()[:NUM_ELEMENTS].cpu()
        num_compared += 1
        if not torch.equal(saved.nan_to_num(), loaded.nan_to_num()):
            differing.append(key)
            num_rounded += torch.equal(saved.bfloat16(), loaded.bfloat16())
    if not differing:
        return CheckResult(item, "ok", f"{num_compared} tensors equal the saved ones")
    rounding_note = ", rounded to lower precision" if num_rounded == len(differing) else ""
    return CheckResult(
        item,
        "fail",
        f"{len(differing)} of {num_compared} tensors in memory differ from the files"
        f"{rounding_note}; first {differing[0]}",
        "check for a cast to another precision, missing keys that were initialised at random, or "
        "another model",
    )


def tensor_files(name: str) -> dict[str, Path]:
    """Return the safetensors file of each tensor of a saved model; empty if there is none."""
    single = saved_file(name, "model.safetensors")
    if single is not None:
        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = saved_file(name, "model.safetensors.index.json")
    if index is None:
        return {}
    names = json.loads(index.read_text())["weight_map"]
    paths = {file: saved_file(name, file) for file in set(names.values())}
    paths_by_tensor = {key: paths[file] for key, file in names.items()}
    return {key: path for key, path in paths_by_tensor.items() if path is not None}


@torch.no_grad()
def check_forward_pass(role: str, model: CausalLM, tokenizer: Any, config: Config) -> CheckResult:
    """Check that the outputs do not depend on randomness, masked ids, later ids or padding."""
    item = f"{role} forward pass"
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    rows = [[v % model.vocabulary for v in ids[:MAX_IDS]] for ids in texts]
    rows[0] = rows[0][: max(NUM_POSITIONS + 1, len(rows[0]) // 3)]
    width = max(map(len, rows))
    ids = left_pad(rows, torch.long).to(model.device)
    attention_mask = left_pad([[1] * len(row) for row in rows], torch.long).to(model.device)
    unit = rounding_unit(config)
    first_pass = last_position_logp(model, ids, attention_mask)
    repeated = last_position_logp(model, ids, attention_mask)
    with evaluation_mode(model.network):
        reference = last_position_logp(model, ids, attention_mask)
        refilled = last_position_logp(
            model,
            torch.where(attention_mask == 1, ids, (ids + 7) % model.vocabulary),
            attention_mask,
        )
        unpadded = last_position_logp(
            model, ids[:1, width - len(rows[0]) :], attention_mask[:1, width - len(rows[0]) :]
        )
        changed_ids = ids.clone()
        changed_ids[:, -1] = (changed_ids[:, -1] + 7) % model.vocabulary
        perturbed = last_position_logp(model, changed_ids, attention_mask)
    numbers = {
        "chance": largest_gap(first_pass, repeated) / unit,
        "mask": largest_gap(reference, refilled) / unit,
        "later": largest_gap(reference[:, :-1], perturbed[:, :-1]) / unit,
        "padding": largest_gap(reference[:1], unpadded) / unit,
    }
    if not bool(first_pass.isfinite().all()):
        advice = "the weights are corrupt or diverged: load an earlier checkpoint"
        return CheckResult(item, "fail", "log-probabilities are not finite", advice, numbers)
    max_units = MAX_FLOAT32_UNITS if unit == ROUNDING["float32"] else MAX_ROUNDING_UNITS
    for name, problem, advice in FORWARD_CHECKS:
        if not numbers[name] <= max_units:
            message = (
                f"{problem}, by {numbers[name] * unit:.2g} nats "
                f"(rounding explains {max_units * unit:.1g})"
            )
            return CheckResult(item, "fail", message, advice, numbers)
    return CheckResult(item, "ok", "each row's output depends on its own text only", "", numbers)


MAX_FLOAT32_UNITS = 4 * MAX_ROUNDING_UNITS
"""Largest units of rounding of the largest difference over positions, in float32.

Small models with large weights, on text that they never saw, exceed the root mean square by this
factor (9e-5 nats was seen); no fault of padding, masks or order is below 1e-3 nats.
"""
FORWARD_CHECKS = (
    (
        "chance",
        "two identical passes give different log-probabilities",
        "check for dropout, and call eval() on the network",
    ),
    (
        "mask",
        "masked ids change the log-probabilities: the attention mask is ignored",
        "use an attention implementation that supports a mask",
    ),
    (
        "later",
        "later ids change the log-probabilities at earlier positions: the model is not causal",
        "load it as a causal language model",
    ),
    (
        "padding",
        "left padding changes the log-probabilities of a row",
        "use a model that supports position_ids and an attention mask",
    ),
)
"""Checks of the forward pass: key, problem, advice."""


def last_position_logp(model: CausalLM, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return (B, NUM_POSITIONS, V) log-probabilities at the last positions of left-padded rows."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    states = model.hidden(ids, attention_mask, positions)[:, -NUM_POSITIONS:]
    flat = model.head.logits(states.flatten(0, 1))
    return flat.log_softmax(-1).unflatten(0, states.shape[:2])


def largest_gap(first: Tensor, second: Tensor) -> float:
    """Return the largest root mean square difference over the most likely ids of a position.

    Args:
        first: (B, L, V) log-probabilities; their most likely ids are compared.
        second: (B, L, V) log-probabilities.

    Returns:
        The difference in nats; NaN if an input is NaN.
    """
    ids = first.topk(min(NUM_IDS, first.shape[-1]), -1).indices
    gap = first.gather(-1, ids) - second.gather(-1, ids)
    return float(gap.double().square().mean(-1).sqrt().amax())
