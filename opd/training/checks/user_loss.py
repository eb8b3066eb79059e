"""Whether a loss of the user's own can be trained with: its audit, before the first step."""

import warnings

from diagnostics.errors import InvalidInput
from opd.config.groups import ObjectiveConfig
from opd.objectives.audit.audit import audit
from opd.objectives.audit.card import FAULTS, AuditCard
from opd.objectives.audit.faults import EMPTY_ROWS
from opd.objectives.user_loss import UserLoss


def check_user_loss(loss: UserLoss, config: ObjectiveConfig) -> None:
    """Refuse a loss that the audit calls faulty, or that divides by something else than declared.

    A loss that cannot be audited, because it fails in small worlds, is trained with a warning.

    Args:
        loss: The loss.
        config: Settings of the objective.

    Raises:
        InvalidInput: It is faulty and faults are not allowed, or `loss_divisor` is wrong.
    """
    try:
        card = audit(loss, faults_only=True)
    except InvalidInput as error:
        warnings.warn(f"{error}; it is trained without an audit", stacklevel=2)
        return
    faults = run_faults(card)
    if faults and not config.allow_faulty_loss:
        listed = "; ".join(f"{code}: {card.evidence.get(code, FAULTS[code])}" for code in faults)
        raise InvalidInput(
            f"the objective {loss.name} is faulty ({listed}); see `opd audit {loss.name}` and mend "
            "it, or set allow_faulty_loss"
        )
    divisor = config.loss_divisor
    if divisor == "update":
        return
    if card.unit != "row":
        raise InvalidInput(
            f"loss_divisor is {divisor}, but the objective {loss.name} couples the rows of a "
            f"{card.unit}, so that an update cannot be split; set loss_divisor to update"
        )
    if card.divisor != divisor:
        raise InvalidInput(
            f"loss_divisor is {divisor}, but the objective {loss.name} divides by {card.divisor}; "
            f"set loss_divisor to {card.divisor}"
        )


def run_faults(card: AuditCard) -> list[str]:
    """Return the faults that matter in a run, whose teacher is constant and updates have no gaps.

    Args:
        card: The card of the loss.

    Returns:
        Its faults without `teacher_gradient`, and without `padding_dependent` where only empty rows
        show it.
    """
    padding = card.evidence.get("padding_dependent", "")
    harmless = {"teacher_gradient"}
    if padding.startswith(EMPTY_ROWS):
        harmless.add("padding_dependent")
    return [code for code in card.faults if code not in harmless]
