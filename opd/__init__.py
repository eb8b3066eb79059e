"""On-policy distillation of language models: trainer, objectives, checks and reports.

Modules are private; only names exported by `opd` and `diagnostics` are stable. Importing the
package loads none of them: each is imported when it is first used, and all but the objectives need
the extra `train`.
"""

from typing import TYPE_CHECKING

from diagnostics.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from opd.config.settings import Config
    from opd.evaluation.evaluate import evaluate
    from opd.library import sample
    from opd.objectives.audit.audit import audit
    from opd.objectives.audit.card import AuditCard
    from opd.objectives.catalogue import OBJECTIVES
    from opd.objectives.factory import make_objective
    from opd.objectives.objective import Objective
    from opd.objectives.requirements import Requirements
    from opd.runtime.version import __version__
    from opd.scoring.loss import policy_loss, policy_losses
    from opd.scoring.request import ScoreRequest
    from opd.scoring.score import ScoredBatch, score_batch
    from opd.teachers.pair import ModelPair, load_pair
    from opd.teachers.teacher import Teacher
    from opd.training.result import TrainResult
    from opd.training.train import train

__all__ = [
    "OBJECTIVES",
    "AuditCard",
    "Config",
    "ModelPair",
    "Objective",
    "Requirements",
    "ScoreRequest",
    "ScoredBatch",
    "Teacher",
    "TrainResult",
    "__version__",
    "audit",
    "evaluate",
    "load_pair",
    "make_objective",
    "policy_loss",
    "policy_losses",
    "sample",
    "score_batch",
    "train",
]

MODULES = {
    "AuditCard": "opd.objectives.audit.card",
    "Config": "opd.config.settings",
    "ModelPair": "opd.teachers.pair",
    "OBJECTIVES": "opd.objectives.catalogue",
    "Objective": "opd.objectives.objective",
    "Requirements": "opd.objectives.requirements",
    "ScoreRequest": "opd.scoring.request",
    "ScoredBatch": "opd.scoring.score",
    "Teacher": "opd.teachers.teacher",
    "TrainResult": "opd.training.result",
    "__version__": "opd.runtime.version",
    "audit": "opd.objectives.audit.audit",
    "evaluate": "opd.evaluation.evaluate",
    "load_pair": "opd.teachers.pair",
    "make_objective": "opd.objectives.factory",
    "policy_loss": "opd.scoring.loss",
    "policy_losses": "opd.scoring.loss",
    "sample": "opd.library",
    "score_batch": "opd.scoring.score",
    "train": "opd.training.train",
}
"""Exported name -> the module that defines it."""

__getattr__, __dir__ = lazy_names(__name__, MODULES, "train")
