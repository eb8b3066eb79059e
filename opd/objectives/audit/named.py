"""Losses by name: a function's, one of ours, or one of another library.

`ours:NAME[,setting=value...]`, `trl:TRAINER[,setting=value...]`, `verl:MODE[,setting=value...]`,
MODULE:FUNCTION or FILE.py:FUNCTION.
"""

import inspect
from importlib import import_module
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import load_function
from opd.objectives.audit.ours import objective_loss
from opd.objectives.catalogue import KNOWN_ERRORS
from opd.objectives.factory import make_objective
from opd.objectives.objective import Objective
from opd.objectives.reduction import DENOMINATORS
from opd.objectives.user_loss import UserLoss, as_user_loss

LIBRARIES = {"trl": "opd.objectives.audit.trl.loading", "verl": "opd.objectives.audit.verl.loading"}
"""Prefix -> module with `load(name, settings) -> UserLoss` for the losses of a library."""


def load_loss(target: str) -> UserLoss:
    """Return the loss that a target names.

    Args:
        target: See the module.

    Returns:
        The loss.

    Raises:
        InvalidInput: The target names nothing, or a setting is unknown or out of range.
        MissingFile: FILE.py does not exist.
        MissingExtra: The library is not installed.
    """
    kind, _, rest = target.partition(":")
    if kind != "ours" and kind not in LIBRARIES:
        return as_user_loss(load_function(target, "loss"), target)
    name, *parts = rest.split(",")
    settings: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise InvalidInput(f"{target}: {part!r} is no setting; write {kind}:NAME,setting=value")
        settings[key.strip()] = value.strip()
    if kind == "ours":
        return our_loss(target, name, settings)
    loss: UserLoss = import_module(LIBRARIES[kind]).load(name, settings)
    return loss


def our_loss(target: str, name: str, settings: dict[str, str]) -> UserLoss:
    """Return a composition of ours, collapsing forms and known errors included.

    Args:
        target: Name for messages.
        name: Name of the objective.
        settings: Options of `opd.objectives.factory.make_objective` and `denominator`, as texts.

    Returns:
        The loss.

    Raises:
        InvalidInput: The name or a setting is unknown, or a value is no such value.
    """
    settings = dict(settings)
    denominator = settings.pop("denominator", "token_mean")
    if denominator not in DENOMINATORS:
        raise InvalidInput(
            f"{target}: unknown denominator {denominator!r}; known: {', '.join(DENOMINATORS)}"
        )
    if name in KNOWN_ERRORS:
        objective: Objective = KNOWN_ERRORS[name][0]
        if settings:
            raise InvalidInput(f"{target}: {name} is a known error without settings")
        return objective_loss(target, objective, denominator)
    parameters = inspect.signature(make_objective).parameters
    options: dict[str, Any] = {"support_k": 2, "allow_collapse": True}
    for key, value in settings.items():
        if key not in parameters or key in ("name", "allow_collapse"):
            known = [x for x in parameters if x not in ("name", "allow_collapse")]
            raise InvalidInput(
                f"{target}: unknown setting {key!r}; known: {', '.join([*known, 'denominator'])}"
            )
        options[key] = _value(target, key, value)
    return objective_loss(target, make_objective(name, **options), denominator)


def _value(target: str, key: str, text: str) -> Any:
    """Return a setting's value: a name, a number, or numbers separated by slashes for `clip`."""
    if key in ("baseline", "ratio", "reward_baseline", "mask_scope"):
        return text
    try:
        if key == "support_k":
            return int(text)
        if key == "clip":
            return tuple(float(x) for x in text.split("/"))
        return float(text)
    except ValueError as error:
        raise InvalidInput(f"{target}: {key} is {text!r}, expected a number") from error
