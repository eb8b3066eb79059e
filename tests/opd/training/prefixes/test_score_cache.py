"""A cache of a teacher's scores: the run with it has the bits of the run with the teacher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.records.batch_files import load_batch
from opd.cli.cache import main as cache_command
from opd.config.files import to_flat
from opd.config.settings import Config, with_settings
from opd.models.loading import load_model
from opd.teachers.score_cache import files
from opd.teachers.score_cache.files import read_index
from opd.teachers.score_cache.keys import batch_key
from opd.training import score_cache
from opd.training.score_cache import check_cache, make_cache
from opd.training.train import train
from tests.helpers.runs import rows, settings

FROZEN: dict[str, Any] = {
    "prefixes": "dataset",
    "group_size": 1,
    "steps": 3,
    "max_response": 40,
    "eval_every": 0,
    "eval_problems": 1,
    "save_batch_every": 1,
    "max_tokens_per_microbatch": 120,  # micro-batches of one or two rows
    "max_logits_per_chunk": 3000,
    "seed": 3,
}


@pytest.fixture(scope="module")
def config(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return settings(tiny_pair, tmp_path_factory.mktemp("live") / "run", **FROZEN)


@pytest.fixture(scope="module")
def cache(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "scores"
    make_cache(config, folder)
    return folder


def cached(config: Config, cache: Path, out: Path, **changes: object) -> Config:
    return with_settings(config, teacher=f"cache:{cache}", out=str(out), **changes)


def saved_batch(folder: Path, step: int) -> ScoredRollouts:
    batch = load_batch(folder / "batches" / f"step_{step:06d}.safetensors")
    assert isinstance(batch, ScoredRollouts)
    return batch


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "teacher_topk_bucket"},
        {"objective": "intersection_topk", "full_metrics_every": 2},
        {"objective": "sampled_token", "allow_unweighted": True, "support_k": 3},
        {"objective": "negative_log_likelihood"},
    ],
    ids=lambda changes: changes["objective"],
)
def test_the_cached_run_has_the_bits_of_the_live_run(
    config: Config, cache: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    live = train(with_settings(config, out=str(tmp_path / "live"), **changes)).folder
    folder = train(cached(config, cache, tmp_path / "cached", **changes)).folder
    for step in range(3):
        expected, actual = saved_batch(live, step), saved_batch(folder, step)
        for name in ("tokens", "student_logp", "teacher_logp"):
            assert torch.equal(getattr(expected, name), getattr(actual, name)), name
        assert expected.support is not None
        assert actual.support is not None
        names = ["ids", "teacher_logp"]
        if "topk" in changes["objective"]:
            names.append("student_logp")
        for name in names:
            assert torch.equal(getattr(expected.support, name), getattr(actual.support, name)), name
    live_rows, cached_rows = rows(live), rows(folder)
    for live_row, cached_row in zip(live_rows, cached_rows, strict=True):
        assert cached_row.keys() <= live_row.keys()
        for name in ("loss", "grad_norm", "divergence/k1", "divergence/overlap_ratio"):
            assert cached_row.get(name) == live_row.get(name), name
        assert "divergence/reverse_kl" not in cached_row
        assert cached_row["consistency/teacher_rescored"] == 0
        assert cached_row["cost/teacher_tokens"] == 0 < live_row["cost/teacher_tokens"]
        for name in ("cost/student_tokens", "cost/teacher_sampled_tokens"):
            assert cached_row[name] == live_row[name] == 0, "the responses were given"
    weights = [load_file(x / "final" / "model.safetensors") for x in (live, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_scores_are_those_of_the_teacher(config: Config, cache: Path, tmp_path: Path) -> None:
    """One row at a time, without padding, by the model itself."""
    folder = train(cached(config, cache, tmp_path / "run", steps=1)).folder
    batch = saved_batch(folder, 0)
    tokenizer, network = load_model(config.teacher, "cpu", "float32")
    prompts = json.loads((folder / "batches" / "step_000000.prompts.json").read_text())
    assert batch.support is not None
    for i, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        response = batch.tokens[i][batch.mask[i]].tolist()
        with torch.no_grad():
            logits = network(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1]
        logp = logits.log_softmax(-1)
        top = logp.topk(8, -1)
        length, tolerance = len(response), {"atol": 2e-5, "rtol": 1e-5}
        expected = logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(batch.teacher_logp[i, :length], expected, **tolerance)
        assert torch.equal(batch.support.ids[i, :length], top.indices)
        support_logp = batch.support.teacher_logp[i, :length]
        torch.testing.assert_close(support_logp, top.values, **tolerance)


def test_an_interrupted_cache_is_continued(
    config: Config, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of one step; the third step fails once; the files are those of an undisturbed one."""
    monkeypatch.setattr(score_cache, "SHARD_BYTES", 1)
    original = score_cache.score_teacher
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(score_cache, "score_teacher", failing)
    folder = tmp_path / "scores"
    with pytest.raises(KeyboardInterrupt):
        make_cache(config, folder)
    assert read_index(folder).num_done == 2
    with pytest.raises(InvalidInput, match="holds 2 of 3 steps; finish it"):
        train(cached(config, folder, tmp_path / "run"))
    index = make_cache(config, folder)
    assert len(calls) == 4
    assert list(index.shards) == [f"scores_{i:05d}.safetensors" for i in range(3)]
    whole = load_file(cache / "scores_00000.safetensors")
    parts = [load_file(folder / name) for name in index.shards]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name
    for part in parts:  # a step is a batch: the key of its rows, in order
        row_bytes = [row.numpy().tobytes() for row in part["keys"]]
        assert {row.numpy().tobytes() for row in part["batch_keys"]} == {batch_key(row_bytes)}
    assert index.num_tokens == len(whole["sampled"]) == int(whole["lengths"].sum())
    longer = make_cache(with_settings(config, steps=4), folder)
    assert longer.num_done == 4
    assert len(calls) == 5


@pytest.mark.parametrize("change", [{"seed": 4}, {"max_response": 3}])
def test_a_cache_of_other_responses_is_not_continued(
    config: Config, cache: Path, change: dict[str, object]
) -> None:
    before = (cache / files.CACHE_FILE).read_bytes()
    with pytest.raises(InvalidInput, match=r"other responses than those of step 0.*choose another"):
        make_cache(with_settings(config, **change), cache)
    assert (cache / files.CACHE_FILE).read_bytes() == before
    make_cache(with_settings(config, steps=2), cache)  # the first steps of the same run
    assert read_index(cache).num_done == 3


def test_the_row_of_another_batch_serves_where_its_own_is_not_there(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    """Another micro-batch gives the same scores up to rounding, and no error."""
    live = train(with_settings(config, out=str(tmp_path / "live"), prompts_per_step=1)).folder
    folder = train(cached(config, cache, tmp_path / "run", prompts_per_step=1)).folder
    for live_row, row in zip(rows(live), rows(folder), strict=True):
        assert row["loss"] == pytest.approx(live_row["loss"], rel=1e-4)


def test_a_teacher_with_a_view_is_cached_after_what_it_reads(
    config: Config, tmp_path: Path
) -> None:
    view = tmp_path / "view.jinja"
    view.write_text("{{ prompt }} {{ answer }}{{ answer }}")
    changes = {"teacher_view": str(view), "steps": 1}
    live = with_settings(config, out=str(tmp_path / "live"), **changes)
    make_cache(live, tmp_path / "scores")
    run = cached(live, tmp_path / "scores", tmp_path / "cached")
    expected, actual = (saved_batch(train(x).folder, 0) for x in (live, run))
    assert torch.equal(expected.teacher_logp, actual.teacher_logp)
    assert rows(Path(live.out))[0]["loss"] == rows(Path(run.out))[0]["loss"]
    with pytest.raises(InvalidInput, match="responses of step 0 are not in the cache"):
        train(with_settings(run, out=str(tmp_path / "plain"), teacher_view=""))


def test_mapped_ends_have_the_bits_too(config: Config, tmp_path: Path) -> None:
    """The teacher ends with another token than the student, and is read at its own."""
    teacher = tmp_path / "teacher"
    tokenizer, network = load_model(config.teacher, "cpu", "float32")
    student_eos = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(9)
    network.generation_config.eos_token_id = 9
    network.config.eos_token_id = 9
    network.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    changes = {"teacher": str(teacher), "map_eos": True, "steps": 1, "max_response": 200}
    live = with_settings(config, out=str(tmp_path / "live"), **changes)
    expected = saved_batch(train(live).folder, 0)
    folder = tmp_path / "scores"
    assert make_cache(live, folder).header.mapped_eos == (student_eos,)
    run = cached(live, folder, tmp_path / "cached")
    actual = saved_batch(train(run).folder, 0)
    assert (expected.tokens == student_eos).any()
    assert torch.equal(expected.teacher_logp, actual.teacher_logp)
    assert expected.support is not None
    assert actual.support is not None
    for name in ("ids", "student_logp", "teacher_logp", "present"):
        assert torch.equal(getattr(expected.support, name), getattr(actual.support, name)), name
    assert rows(Path(live.out))[0]["loss"] == rows(Path(run.out))[0]["loss"]
    with pytest.raises(InvalidInput, match="was made with map_eos, but it is off"):
        train(with_settings(run, out=str(tmp_path / "off"), map_eos=False))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support_k": 9}, "support_k is 9, but the cache .* holds the teacher's 8"),
        ({"temperature": 0.5}, "temperature is 0.5, but the scores .* computed at 1; set that"),
        ({"map_eos": True}, "was made without map_eos, but it is on"),
        ({"seed": 4}, r"\d responses of step 0 are not in the cache"),
        ({"steps": 4}, r"3 responses of step 3 are not in the cache"),
        ({"max_response": 12}, "responses of step 0 are not in the cache"),
        ({"system": "Think."}, "chat template|responses of step 0 are not in the cache"),
        ({"prefixes": "student", "group_size": 2}, "known before the run, but prefixes is student"),
        ({"objective": "student_topk"}, "compares at the student's, which change"),
        ({"objective": "full_forward_kl"}, "is a cache of scores and does not support"),
        ({"probe_every": 1}, "is a cache of scores and does not support probe_every"),
        ({"offload_teacher": True}, "offload_teacher is True, which has an effect only if"),
    ],
)
def test_a_cache_that_does_not_suit_a_run_is_refused_before_it(
    config: Config, cache: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        train(cached(config, cache, tmp_path / "run", **changes))
    path = tmp_path / "run" / "rows.jsonl"
    assert not path.exists() or not path.read_text()


def copy_of(cache: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in cache.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damage_is_named(config: Config, cache: Path, tmp_path: Path) -> None:
    for name, damage, message in (
        ("cut", lambda x: x.write_bytes(x.read_bytes()[:-9]), "bytes instead of"),
        ("gone", Path.unlink, "is missing"),
        ("changed", lambda x: x.write_bytes(x.read_bytes()[:-1] + b"\x01"), "checksum differs"),
    ):
        folder = copy_of(cache, tmp_path / name)
        damage(folder / "scores_00000.safetensors")
        with pytest.raises(InvalidInput, match=message):
            train(cached(config, folder, tmp_path / "run"))
        with pytest.raises(InvalidInput, match=message):
            make_cache(config, folder)
        with pytest.raises(InvalidInput, match=message):
            cache_command(["check", str(folder)])
    folder = copy_of(cache, tmp_path / "index")
    (folder / files.CACHE_FILE).write_text('{"format": "opdlab-teacher-cache-1", "header": 3}')
    with pytest.raises(InvalidInput, match="is damaged"):
        train(cached(config, folder, tmp_path / "run"))
    with pytest.raises(MissingFile, match="holds no cache of a teacher"):
        train(cached(config, tmp_path, tmp_path / "run"))


def test_a_cache_is_bound_to_its_teacher_and_tokenizer(
    config: Config, cache: Path, tmp_path: Path
) -> None:
    other = with_settings(config, teacher=config.student, student=config.teacher)
    with pytest.raises(InvalidInput, match="holds other scores: teacher_fingerprint is"):
        make_cache(other, cache)
    with pytest.raises(InvalidInput, match="holds other scores: teacher_fingerprint is"):
        check_cache(other, cache)
    assert check_cache(config, cache).num_done == 3
    folder = copy_of(cache, tmp_path / "scores")
    run = cached(config, folder, tmp_path / "run", steps=2, save_every=1)
    train(with_settings(run, steps=1))
    content = json.loads((folder / files.CACHE_FILE).read_text())
    content["header"]["teacher_fingerprint"] = "0" * 16
    (folder / files.CACHE_FILE).write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="the scores of another teacher than at the start"):
        train(run)
    content["header"]["tokenizer_fingerprint"] = "0" * 16
    (folder / files.CACHE_FILE).write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="another tokenizer than the student's"):
        train(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": "student", "group_size": 2}, "set prefixes to dataset"),
        ({"teacher": "ema"}, "whose scores cannot be computed in advance"),
        ({"teacher": "none", "objective": "negative_log_likelihood"}, "cannot be computed in"),
        ({"teacher": "cache:x"}, "cannot be computed in advance"),
    ],
)
def test_what_cannot_be_cached(
    config: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        make_cache(with_settings(config, **changes), tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_the_command_makes_and_checks(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "config.json", str(tmp_path / "scores")
    path.write_text(json.dumps(to_flat(config)))
    for action in ("make", "check"):
        cache_command([action, folder, "--config", str(path)])
        assert "3 of 3 steps" in capsys.readouterr().out
    cache_command(["check", folder])
    with safe_open(f"{folder}/scores_00000.safetensors", framework="pt") as shard:
        assert f"{len(shard.get_tensor('sampled'))} tokens with the 8" in capsys.readouterr().out
    with pytest.raises(InvalidInput, match="needs the settings of the run: a recipe or --config"):
        cache_command(["make", folder])
    for wrong in (["mend", folder], ["make"], ["make", "--config", str(path)]):
        with pytest.raises(SystemExit):
            cache_command(wrong)
