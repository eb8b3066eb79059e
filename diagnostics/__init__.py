"""Diagnostics of on-policy distillation for any trainer: metrics, alarms, probes, records.

Modules are private; only names exported by `opd` and `diagnostics` are stable. Importing the
package loads none of them: each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from diagnostics.io.lazy_names import lazy_names

if TYPE_CHECKING:
    from diagnostics.adapters.from_logits import from_logits
    from diagnostics.adapters.trl import observe_trl, trl_callback
    from diagnostics.alarms.alarms import Alarms
    from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support
    from diagnostics.catalogue import PANEL
    from diagnostics.errors import UserError
    from diagnostics.monitor import Monitor
    from diagnostics.records.reader import load_records
    from diagnostics.records.sinks import to_file
    from diagnostics.records.writer import save_records
    from diagnostics.stats import bootstrap_interval

__all__ = [
    "PANEL",
    "Alarms",
    "DistributionStats",
    "Monitor",
    "Rollouts",
    "ScoredRollouts",
    "Support",
    "UserError",
    "bootstrap_interval",
    "from_logits",
    "load_records",
    "observe_trl",
    "save_records",
    "to_file",
    "trl_callback",
]

MODULES = {
    "Alarms": "diagnostics.alarms.alarms",
    "DistributionStats": "diagnostics.batch",
    "Monitor": "diagnostics.monitor",
    "PANEL": "diagnostics.catalogue",
    "Rollouts": "diagnostics.batch",
    "ScoredRollouts": "diagnostics.batch",
    "Support": "diagnostics.batch",
    "UserError": "diagnostics.errors",
    "bootstrap_interval": "diagnostics.stats",
    "from_logits": "diagnostics.adapters.from_logits",
    "load_records": "diagnostics.records.reader",
    "observe_trl": "diagnostics.adapters.trl",
    "save_records": "diagnostics.records.writer",
    "to_file": "diagnostics.records.sinks",
    "trl_callback": "diagnostics.adapters.trl",
}
"""Exported name -> the module that defines it."""

__getattr__, __dir__ = lazy_names(__name__, MODULES, "all")
