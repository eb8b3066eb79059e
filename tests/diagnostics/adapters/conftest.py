"""The models of the tests of TRL's trainers."""

import gc
from typing import Any

import pytest

from tests.helpers.trl_trainers import load_pair


@pytest.fixture(scope="module")
def pair(tiny_pair) -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer).

    Every training run of TRL collects garbage, which would search all imported modules for 0.3 s.
    These stay exempt until the session ends, as what the other tests import.
    """
    from trl import DistillationTrainer  # noqa: F401, imports nearly all that the others need

    models = load_pair(tiny_pair)
    gc.collect()
    gc.freeze()
    return models
