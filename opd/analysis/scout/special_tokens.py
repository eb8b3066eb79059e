"""Special tokens that a student wrote, in any split, and what masking each would remove.

Shapes: B responses, T response positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diagnostics.batch import ScoredRollouts
from diagnostics.core.totals import Mean, compute
from opd.teachers.pair import ModelPair
from opd.tokens.masking import (
    THINK,
    ResolvedMaskRules,
    mask_rule_metrics,
    resolve_mask_rules,
    rule_hits,
    special_ids,
)
from opd.tokens.token_bytes import token_bytes

SPECIAL_RULES = ("role:special", "role:think")
"""Mask rules of the special tokens, to which `special_rules` adds the text of each in any split."""


@dataclass(frozen=True)
class RuleShare:
    """What a mask rule would remove from the student's rollouts."""

    rule: str
    """Text of the rule."""
    tokens: float
    """Share of the sampled tokens."""
    signal: float
    """Share of sum |log student - log teacher|."""
    gap: float
    """Mean of log student - log teacher over the tokens of the rule, in nats."""


def special_rules(pair: ModelPair, batch: ScoredRollouts) -> list[ResolvedMaskRules]:
    """Return the rules of special tokens: SPECIAL_RULES and the text of each that was written.

    A model may write the text of a special token in other tokens, which the other model does not
    expect; its rule finds the text in any split.

    Args:
        pair: Student and teacher.
        batch: Rollouts of the student.

    Returns:
        The rules, those of texts last.
    """
    table = token_bytes(pair.tokenizer)
    rows = zip(batch.tokens.tolist(), batch.sampled.tolist(), strict=True)
    written_texts = [
        b"".join(table[v] for v, sampled in zip(*row, strict=True) if sampled and v < len(table))
        for row in rows
    ]
    names = sorted({pair.tokenizer.decode([v]) for v in special_ids(pair.tokenizer)} | {*THINK})
    occurring_names = [
        name for name in names if any(name.encode() in text for text in written_texts)
    ]
    return resolve_mask_rules(
        [*SPECIAL_RULES, *(f"string:{name}" for name in occurring_names)], pair.tokenizer, pair.eos
    )


def rule_shares(batch: ScoredRollouts, rules: Sequence[ResolvedMaskRules]) -> tuple[RuleShare, ...]:
    """Return what the rules of texts would each remove, the largest share of the signal first."""
    text_rules = [rule for rule in rules if rule.name.startswith("string:")]
    values = compute(mask_rule_metrics(batch, text_rules)) if text_rules else {}
    shares = []
    for rule in text_rules:
        hits = rule_hits(batch.tokens, batch.sampled, rule)
        shares.append(
            RuleShare(
                rule=rule.name,
                tokens=values[f"mask/{rule.name}/tokens"],
                signal=values[f"mask/{rule.name}/signal"],
                gap=Mean.from_values(batch.log_ratio, hits).value(),
            )
        )
    return tuple(sorted(shares, key=lambda share: -share.signal))
