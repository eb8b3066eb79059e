"""Apply mask rules: which sampled tokens are not supervised, and how much signal that removes.

A masked token stays in the sequence, in the attention and in what was sampled; only its supervision
is removed, so a mask may have holes.

Shapes: B responses, T response positions, K support, V ids that a tokenizer knows, Q bytes of text
in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput
from diagnostics.ragged import up_to_last
from opd.tokens.eos import first_occurrences
from opd.tokens.mask_rules import MaskRule, parse_rules
from opd.tokens.token_bytes import TokenBytes, pack_token_bytes, token_bytes

Batch = TypeVar("Batch", bound=Rollouts)
THINK = ("<think>", "</think>")


@dataclass(frozen=True, eq=False)
class ResolvedMaskRules:
    """A mask rule in the ids of one tokenizer: the ids or byte strings that it masks."""

    name: str
    """Text of the rule."""
    first: bool
    """Whether only the first occurrence in a response is masked."""
    ids: tuple[int, ...]
    """Ids to mask."""
    strings: tuple[bytes, ...]
    """Byte strings whose tokens are masked."""
    token_bytes: TokenBytes
    """Bytes of every id of the tokenizer."""


def resolve_mask_rules(
    texts: Sequence[str], tokenizer: Any, eos: Sequence[int]
) -> list[ResolvedMaskRules]:
    """Resolve rules (`opd.tokens.mask_rules`) to the ids of a tokenizer.

    Args:
        texts: Rules or names of presets.
        tokenizer: Hugging Face tokenizer.
        eos: Every id that ends a response, used by role:eos.

    Returns:
        One resolved rule per rule.

    Raises:
        InvalidInput: A text is not a rule, or the tokenizer lacks the token that it names.
    """
    rules = parse_rules(texts)
    if not rules:
        return []
    bytes_by_id = token_bytes(tokenizer)
    packed_bytes = pack_token_bytes(bytes_by_id)
    return [_resolve(rule, tokenizer, tuple(eos), bytes_by_id, packed_bytes) for rule in rules]


def _resolve(
    rule: MaskRule,
    tokenizer: Any,
    eos: tuple[int, ...],
    bytes_by_id: list[bytes],
    packed_bytes: TokenBytes,
) -> ResolvedMaskRules:
    """Resolve one rule."""
    ids: tuple[int, ...] = ()
    strings: tuple[bytes, ...] = ()
    if rule.kind == "string":
        strings = (rule.value.encode(),)
    elif rule.kind == "role" and rule.value == "think":
        strings = tuple(tag.encode() for tag in THINK)
    elif rule.kind == "id":
        ids = (int(rule.value),)
    elif rule.kind == "token":
        ids = tuple(v for v, token in enumerate(bytes_by_id) if token == rule.value.encode())
    else:
        single_ids = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}
        ids = {"eos": eos, "special": special_ids(tokenizer)}.get(rule.value) or tuple(
            v for v in [single_ids.get(rule.value)] if v is not None
        )
    if not ids and not strings:
        hint = (
            "; string:TEXT matches text in any split"
            if rule.kind == "token"
            else "; remove the rule"
        )
        raise InvalidInput(f"mask rule {rule.name!r}: the tokenizer has no such token{hint}")
    return ResolvedMaskRules(rule.name, rule.occurrence == "first", ids, strings, packed_bytes)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that are special by name (eos, pad, ...) or by the flag of an added token."""
    flagged = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(flagged | set(tokenizer.all_special_ids)))


def supervised_mask(tokens: Tensor, mask: Tensor, rules: Sequence[ResolvedMaskRules]) -> Tensor:
    """Return (B, T) the mask without the tokens that any rule removes.

    Every rule reads the original batch, so their order does not matter.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool, tokens supervised so far. Positions after the last supervised one are
            padding and are not read; a hole before it is text.
        rules: Resolved rules.

    Returns:
        (B, T) bool.
    """
    rule_masks = [rule_hits(tokens, mask, rule) for rule in rules]
    return mask & ~torch.stack(rule_masks).any(0) if rule_masks else mask


def rule_hits(tokens: Tensor, mask: Tensor, rule: ResolvedMaskRules) -> Tensor:
    """Return (B, T) bool, the supervised tokens that one rule removes.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool, tokens supervised so far.
        rule: The rule. `first` means the first occurrence in the response of each id, or of each
            string, that touches a supervised token.

    Returns:
        (B, T) bool, a subset of the mask.
    """
    hits = torch.zeros_like(mask)
    if rule.ids:
        hits = torch.isin(tokens, torch.tensor(rule.ids, device=tokens.device)) & mask
        if rule.first:
            hits = first_occurrences(tokens, hits)
    packed_bytes = rule.token_bytes.to(tokens.device) if rule.strings else rule.token_bytes
    for string in rule.strings:
        hits = hits | string_hits(tokens, mask, string, packed_bytes, first=rule.first)
    return hits


def string_hits(
    tokens: Tensor, mask: Tensor, string: bytes, packed_bytes: TokenBytes, *, first: bool
) -> Tensor:
    """Return (B, T) bool, the supervised tokens that share a byte with an occurrence of the string.

    The ids are expanded to bytes (Q,), row after row, and the string is compared at every byte.
    Occurrences may overlap one another and never cross a response boundary.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool, tokens supervised so far.
        string: Bytes to find.
        packed_bytes: Bytes of every id, on the device of the tokens.
        first: Whether only the first occurrence in each response counts.

    Returns:
        (B, T) bool, a subset of the mask.
    """
    width, flat = tokens.shape[1], tokens.flatten().clamp(max=len(packed_bytes.length) - 1)
    length = torch.where(up_to_last(mask).flatten(), packed_bytes.length[flat], 0)
    owner = torch.repeat_interleave(length)  # (Q,) flat token index of each byte
    if len(owner) < len(string):
        return torch.zeros_like(mask)
    offset = torch.arange(len(owner), device=tokens.device) - (length.cumsum(0) - length)[owner]
    text = packed_bytes.data[packed_bytes.start[flat[owner]] + offset]
    pattern = torch.tensor(list(string), dtype=torch.uint8, device=tokens.device)
    begin, end = owner[: len(owner) - len(string) + 1], owner[len(string) - 1 :]
    num_supervised_before = torch.nn.functional.pad(mask.flatten().long().cumsum(0), (1, 0))
    matches = (text.unfold(0, len(string), 1) == pattern).all(1)
    matches &= (begin // width == end // width) & (
        num_supervised_before[end + 1] > num_supervised_before[begin]
    )
    begin, end = begin[matches], end[matches]
    if first:
        row = begin // width
        is_first = torch.ones_like(row, dtype=torch.bool)
        is_first[1:] = row[1:] != row[:-1]
        begin, end = begin[is_first], end[is_first]
    step = torch.zeros(tokens.numel() + 1, dtype=torch.long, device=tokens.device)
    step.index_add_(0, begin, torch.ones_like(begin))
    step.index_add_(0, end + 1, -torch.ones_like(end))
    return (step[:-1].cumsum(0) > 0).reshape(tokens.shape) & mask


def apply_mask_rules(batch: Batch, rules: Sequence[ResolvedMaskRules]) -> Batch:
    """Return the batch with the rules' tokens unsupervised and the rules in the mask's name.

    The rules read the sampled tokens, so tokens that are already unsupervised do not affect them.

    Args:
        batch: Rollouts.
        rules: Resolved rules.

    Returns:
        The batch (`Rollouts.restrict_mask`), unchanged if there are no rules.
    """
    if not rules:
        return batch
    keep = supervised_mask(batch.tokens, batch.sampled, rules)
    return batch.restrict_mask(keep, " - ".join(rule.name for rule in rules))


def mask_rule_metrics(
    batch: ScoredRollouts, rules: Sequence[ResolvedMaskRules]
) -> dict[str, Accumulator]:
    """Return how much of the sampled tokens and of their signal each rule removes.

    With r = log student - log teacher and m the sampled tokens, for each rule by itself and for
    "all" rules together: mask/RULE/tokens = sum m 1[removed] / sum m; mask/RULE/signal = sum m
    1[removed] |r| / sum m |r|; mask/RULE/energy = sum m 1[removed] r^2 / sum m r^2. Tokens that are
    unsupervised for other reasons count as sampled.

    Args:
        batch: Scored rollouts.
        rules: Resolved rules.

    Returns:
        Accumulators by metric name, which add over steps; sampling unit: prompt.
    """
    sampled = batch.sampled
    removed_by_rule = {rule.name: rule_hits(batch.tokens, sampled, rule) for rule in rules}
    removed_by_rule["all"] = sampled & ~supervised_mask(batch.tokens, sampled, rules)
    quantities = {"tokens": torch.ones_like(batch.log_ratio), "signal": batch.log_ratio.abs()}
    quantities["energy"] = batch.log_ratio.square()
    return {
        f"mask/{name}/{quantity}": Mean.ratio(value * is_removed, value, sampled, batch.prompt)
        for name, is_removed in removed_by_rule.items()
        for quantity, value in quantities.items()
    }
