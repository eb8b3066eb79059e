"""What most processes of tests need, imported without a search for garbage and exempt from it.

Such a search in a fork would also copy every page of memory that it shares with its parent.
"""

import atexit
import gc
import os
from importlib import import_module

from opd.cli.main import GARBAGE_THRESHOLDS

MODULES = (
    "opd.training.train",
    "opd.teachers.factory",
    "transformers.models.qwen2.modeling_qwen2",
    "diagnostics.monitor",
)

atexit.register(os._exit, 0)  # an interpreter with torch takes long to be torn down
os.environ["TRITON_INTERPRET"] = "1"  # read when torch imports triton; forks compute on CPUs
gc.disable()
for name in MODULES:
    import_module(name)
gc.freeze()
gc.set_threshold(*GARBAGE_THRESHOLDS)
gc.enable()
