"""The card of an audit: what it holds, as JSON, as text and as a page."""

import html
import json
from dataclasses import dataclass, field
from typing import Any

from opd.objectives.audit.behaviour import Behaviour
from opd.objectives.audit.noise import Noise
from opd.objectives.audit.rest import Rest

FAULTS: dict[str, str] = {
    "zero_gradient": "the mean gradient vanishes: the loss teaches nothing but noise",
    "no_student_gradient": "no gradient reaches the student",
    "teacher_gradient": "teacher logits that require grad receive one",
    "wrong_sign": "minus the mean is a target's gradient: descent moves away from it",
    "misaligned": "an argument is read one position off",
    "mask_leak": "what lies outside the mask reaches the gradient",
    "padding_dependent": "padding or empty rows change the gradient",
    "batch_dependent": "micro-batches do not add up, whatever they are weighted by",
    "off_teacher_fixed_point": "the student that equals the teacher does not stay there",
    "non_causal": "what the teacher says earlier changes the gradient of later tokens",
    "non_finite": "gradients are NaN or infinite where the target is finite",
    "biased": "the mean is no positive multiple of any known target's gradient",
}
"""Code -> what it means."""
WARNINGS: dict[str, str] = {
    "sequence_mean": "each response's mean of sampled scores: biased where lengths are random",
    "batch_whitening": "scores are centred or scaled by the batch: biased in small batches",
    "group_standardised": "advantages are divided by their group's deviation: prompts with nearly "
    "equal rewards weigh more",
    "clipped": "exact where the models are close, biased where a clip is active",
}
"""Code -> what it means."""
CAVEATS: dict[str, str] = {
    "stale_biased": "on policy it has its target; with rollouts of another policy it has not",
    "random": "the loss draws random numbers; its gradients were averaged",
}
"""Code -> what it means."""


@dataclass(frozen=True, kw_only=True)
class TargetMatch:
    """The target of a loss, or the nearest one."""

    name: str
    """Name of the target; "none" if no target fits."""
    cosine: float | None
    """Smallest cosine with it, or with the nearest target, over the worlds."""
    relative_bias: float | None
    """Largest distance from its best multiple, relative to that multiple."""
    scale: float | None
    """Factor of the multiple, for the weighting below."""
    nearest: str | None = None
    """Nearest target where none fits."""
    weighting: str = ""
    """What the loss divides by, and what was undone to find the target."""


@dataclass(frozen=True, kw_only=True)
class AuditCard:
    """What a loss estimates, how noisily, where it rests, and which known faults it has."""

    loss: str
    """Name of the loss."""
    verdict: str
    """"ok", "warn" or "faulty"."""
    faults: list[str]
    """Codes in FAULTS."""
    warnings: list[str]
    """Codes in WARNINGS."""
    caveats: list[str]
    """Codes in CAVEATS."""
    target: TargetMatch
    """What it estimates the gradient of."""
    unit: str = "batch"
    """Smallest part of a batch whose gradient is its own: "row", "group" of a prompt, "batch"."""
    divisor: str = "one"
    """What it divides the sum over units by: "one", "tokens", "rows" or "prompts"."""
    claimed: str | None = None
    """What its author says that it estimates."""
    noise: Noise | None = None
    """Its variance; None where it could not be enumerated."""
    rest: Rest | None = None
    """Where descent on it ends; None where it could not be enumerated."""
    behaviour: Behaviour | None = None
    """Its bias off its assumptions; None without a target."""
    evidence: dict[str, str] = field(default_factory=dict)
    """Code or remark -> what decided it."""
    sentences: tuple[str, ...] = ()
    """The verdict in three plain sentences."""
    instead: str | None = None
    """The nearest right composition of ours; None where there is nothing to mend."""
    seconds: float = 0.0
    """Duration of the audit."""

    @property
    def exit_status(self) -> int:
        """0 for ok and warn, 1 for faulty."""
        return int(self.verdict == "faulty")

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON values, numbers that are not finite as None."""
        noise, rest, behaviour = self.noise, self.rest, self.behaviour
        card = {
            "loss": self.loss,
            "verdict": self.verdict,
            "faults": self.faults,
            "warnings": self.warnings,
            "caveats": self.caveats,
            "target": vars(self.target),
            "unit": self.unit,
            "divisor": self.divisor,
            "claimed": self.claimed,
            "noise": None
            if noise is None
            else {**vars(noise), "ratio_to_best": noise.ratio_to_best},
            "rest": None if rest is None else {**vars(rest), "at_teacher": rest.at_teacher},
            "behaviour": None if behaviour is None else vars(behaviour),
            "evidence": self.evidence,
            "sentences": list(self.sentences),
            "instead": self.instead,
            "seconds": round(self.seconds, 2),
        }
        finite: dict[str, Any] = _finite(card)
        return finite

    def to_json(self) -> str:
        """Return the card as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by None."""
    if isinstance(value, dict):
        return {k: _finite(x) for k, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def card_rows(card: AuditCard) -> list[tuple[str, str]]:
    """Return the card as pairs of a heading and its text.

    Args:
        card: The card.

    Returns:
        Pairs in the order in which they are shown.
    """
    target = card.target
    rows = [("target", describe_target(target))]
    if card.claimed:
        rows.append(("claimed", card.claimed))
    if card.noise is not None:
        rows.append(("noise", describe_noise(card.noise)))
    if card.rest is not None:
        rows.append(("rest", describe_rest(card.rest)))
    if card.behaviour is not None:
        b = card.behaviour
        rows.append(
            (
                "off its assumptions",
                f"relative bias {b.top_p:.2g} under top-p 0.9, {b.temperature:.2g} at temperature "
                f"0.8, {b.one_update:.2g} one update old, {b.four_updates:.2g} four updates old"
                + (
                    ""
                    if b.lengths is None
                    else f", {b.lengths:.2g} with responses of 1 to {b.longest} tokens"
                ),
            )
        )
    for kind, codes, texts in (
        ("fault", card.faults, FAULTS),
        ("warning", card.warnings, WARNINGS),
        ("caveat", card.caveats, CAVEATS),
    ):
        for code in codes:
            evidence = card.evidence.get(code)
            detail = f" ({evidence})" if evidence else ""
            rows.append((f"{kind} {code}", f"{texts[code]}{detail}"))
    rows += [("remark", text) for key, text in card.evidence.items() if key.startswith("remark")]
    if card.instead:
        rows.append(("write instead", card.instead))
    return rows


def describe_target(target: TargetMatch) -> str:
    """Return the target in words."""
    if target.name == "none":
        if target.nearest is None:
            return "none"
        return f"none; nearest {target.nearest}, cosine {target.cosine:.4f}"
    if target.scale is None:
        return target.name
    return (
        f"{target.name}, times {target.scale:.4g} ({target.weighting}); "
        f"cosine {target.cosine:.6f}, relative bias {target.relative_bias:.1e}"
    )


def describe_noise(noise: Noise) -> str:
    """Return the noise in words."""
    group = f"{noise.group_variance:.4g} of two rows of one prompt"
    row = f"{noise.total_variance:.4g} of one row, " if noise.unit == "row" else ""
    text = f"total variance over the squared mean: {row}{group}"
    if noise.ratio_to_best is None:
        return text
    return f"{text}; {noise.ratio_to_best:.3g} times that of {noise.best} at the same batch"


def describe_rest(rest: Rest) -> str:
    """Return the place of rest in words."""
    place = (
        "at the teacher"
        if rest.at_teacher
        else f"at KL {rest.smallest_kl:.3g} to {rest.largest_kl:.3g} nats a prefix from the teacher"
    )
    return (
        f"from {rest.starts} starts descent ends {place}; the teacher's top-K has student's mass "
        f"{rest.student_mass:.4f} there, teacher's {rest.teacher_mass:.4f} (mean log ratio "
        f"{rest.log_mass_ratio:+.3f}); at teacher = student the mean is {rest.mean_at_teacher:.2g} "
        f"and a single gradient {rest.noise_at_teacher:.2g} of the mean at the start"
    )


def to_text(card: AuditCard) -> str:
    """Return the card for a terminal."""
    lines = [f"{card.verdict.upper()}  {card.loss}  ({card.seconds:.1f} s)", ""]
    lines += [f"  {sentence}" for sentence in card.sentences]
    lines.append("")
    width = max(len(name) for name, _ in card_rows(card))
    lines += [f"  {name:<{width}}  {text}" for name, text in card_rows(card)]
    return "\n".join(lines)


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.2em;overflow-wrap:anywhere} .ok{color:#00734f} .warn{color:#8a5a00}
.faulty{color:#a83f00} table{border-collapse:collapse;width:100%} td{padding:.4em .6em;
vertical-align:top;border-top:1px solid #ddd;overflow-wrap:anywhere}
td:first-child{white-space:nowrap;font-weight:600}
@media(max-width:500px){td{display:block;border:0;padding:.1em 0}
td:first-child{border-top:1px solid #ddd;padding-top:.5em;white-space:normal}}
"""


def to_html(card: AuditCard) -> str:
    """Return the card as a self-contained page."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>"
        for name, text in card_rows(card)
    )
    sentences = html.escape(" ".join(card.sentences).replace("`", ""))
    title = html.escape(card.loss)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>Audit of {title}</title><style>{STYLE}</style></head><body>"
        f"<h1><span class='{card.verdict}'>{card.verdict}</span> {title}</h1>"
        f"<p>{sentences}</p><table>{rows}</table></body></html>\n"
    )
