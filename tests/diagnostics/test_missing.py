"""Fields that a batch does not have: reading, copying, defaults and files."""

from pathlib import Path

import pytest
import torch

from diagnostics.batch import Rollouts, ScoredRollouts, Support
from diagnostics.concatenation import concatenate
from diagnostics.core.partial import without_fields
from diagnostics.missing import Missing, MissingField, missing_fields, optional_names


def make_batch(**fields) -> ScoredRollouts:
    logp = torch.full((2, 3), -1.0)
    values = {
        "tokens": torch.ones(2, 3, dtype=torch.long),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "prompt": torch.tensor([4, 4]),
        "ended": torch.tensor([True, False]),
        "sampler_logp": logp,
        "student_logp": logp,
        "teacher_logp": 2 * logp,
    }
    return ScoredRollouts(**(values | fields))


def test_reading_a_missing_field_names_it_and_its_owner() -> None:
    batch = make_batch(teacher_logp=Missing("the trainer has"))
    with pytest.raises(MissingField, match=r"^the trainer has no teacher_logp$"):
        batch.teacher_logp  # noqa: B018
    with pytest.raises(MissingField, match="teacher_logp"):
        batch.log_ratio  # noqa: B018
    assert float(batch.student_logp.sum()) == -6
    assert missing_fields(batch) == {"teacher_logp": "the trainer has"}
    assert batch.validate() is batch


def test_every_copy_keeps_what_is_missing_until_it_is_given() -> None:
    batch = without_fields(make_batch(), ["reward", "top_p"], "nobody has")
    for copy in (batch.rows([1]), batch.positions(2), batch.trim(), concatenate([batch, batch])):
        assert missing_fields(copy) == dict.fromkeys(["reward", "top_p"], "nobody has")
        with pytest.raises(MissingField, match="nobody has no top_p"):
            copy.top_p  # noqa: B018
    given = batch.with_fields(reward=torch.tensor([1.0, 2.0]), top_p=0.9)
    assert given.reward.tolist() == [1, 2]
    assert given.top_p == 0.9
    with pytest.raises(ValueError, match="different fields"):
        concatenate([batch, without_fields(batch, ["ended"])])


def test_defaults_hold_for_every_response() -> None:
    batch = make_batch(turn=torch.tensor(3))
    assert batch.task.tolist() == batch.age.tolist() == [0, 0]
    assert batch.turn.tolist() == [3, 3]
    assert batch.reward.isnan().all()
    assert batch.top_p == 1
    assert batch.lengths.tolist() == [3, 3]
    assert make_batch(generated_lengths=torch.tensor([5, 7])).lengths.tolist() == [5, 7]


def test_required_fields_must_be_given_as_tensors() -> None:
    with pytest.raises(TypeError, match="student_logp"):
        ScoredRollouts(**{k: v for k, v in vars(make_batch()).items() if k != "student_logp"})
    with pytest.raises(TypeError, match="ended is of type NoneType"):
        make_batch(ended=None)
    with pytest.raises(TypeError, match=r"support\.student_logp is of type list"):
        Support(
            ids=torch.ones(2, 3, 1, dtype=torch.long),
            student_logp=[],  # type: ignore[arg-type]
            teacher_logp=torch.zeros(2, 3, 1),
            source="teacher",
        )
    assert {"sampler_logp", "ended", "reward"} <= optional_names(Rollouts)
    assert "tokens" not in optional_names(ScoredRollouts)


def test_a_batch_file_is_refused_what_it_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without ended cannot be saved"):
        make_batch(ended=Missing()).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
