"""User errors and failures: other vocabularies, no EOS, NaN weights, kills, full disks."""

import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from diagnostics.errors import InvalidInput
from opd.analysis.continuation import probe_continuation
from opd.analysis.own_prefix import probe_own_prefix
from opd.cli.doctor import DoctorOptions, run_checks
from opd.config.files import read_config
from opd.config.settings import Config, with_settings
from opd.data.chain_task import problems
from opd.data.prompts import encode_prompts
from opd.rollouts.hf_engine import sample
from opd.runs.run_folder import open_run
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.runs import rows, settings
from tests.helpers.warm_process import file_size_limit, run_process, start_process


def copy_with(folder: Path, out: Path, change) -> Path:
    """A saved model after `change` edited its network and tokenizer in place."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_different_vocabularies_are_refused_by_name(tiny_pair, tmp_path: Path) -> None:
    larger_vocabulary = copy_with(
        tiny_pair[1], tmp_path / "other", lambda _, t: t.add_tokens(["<tool>"])
    )
    with pytest.raises(ValueError, match=r"differ in 1 of 261 / 262 .*'<tool>': None / 261"):
        load_pair(str(tiny_pair[0]), str(larger_vocabulary), "cpu", "float32")


def test_a_pair_without_an_end_token_is_refused(tiny_pair, tmp_path: Path) -> None:
    def endless(model, tokenizer) -> None:
        tokenizer.eos_token = None
        model.generation_config.eos_token_id = None

    student = copy_with(tiny_pair[0], tmp_path / "endless", endless)
    with pytest.raises(ValueError, match="no EOS token"):
        load_pair(str(student), str(student), "cpu", "float32")


def test_weights_that_diverged_are_refused_and_leave_the_run_whole(tiny_pair, tmp_path) -> None:
    def diverge(model, _) -> None:
        model.get_output_embeddings().weight.data[7] = float("nan")

    student = copy_with(tiny_pair[0], tmp_path / "nan", diverge)
    pair = load_pair(str(student), str(tiny_pair[1]), "cpu", "float32")
    prompts = encode_prompts(pair.tokenizer, problems("train", 2, 0), 1, 64)
    with pytest.raises(ValueError, match="not finite from response token 0 on"):
        sample(
            pair.student,
            prompts,
            pair.eos,
            max_response=4,
            temperature=1.0,
            top_p=1.0,
            generator=torch.Generator().manual_seed(0),
        )
    with pytest.raises(ValueError, match=r"student forward pass: .*not finite.*earlier checkpoint"):
        train(settings((student, tiny_pair[1]), tmp_path / "refused"))
    unchecked = settings((student, tiny_pair[1]), tmp_path / "run", start_checks=False)
    with pytest.raises(ValueError, match="not finite from response token 0 on"):
        train(unchecked)
    assert not (tmp_path / "run" / "rows.jsonl").read_text()


def test_two_processes_do_not_share_a_run_folder(tiny_pair, tmp_path: Path) -> None:
    config = settings(tiny_pair, tmp_path / "run")
    with open_run(config), pytest.raises(RuntimeError, match="another process is writing"):
        train(config)


def test_a_run_that_began_keeps_its_settings_and_one_that_never_did_may_change(
    tiny_pair, tmp_path: Path
) -> None:
    config = settings(tiny_pair, tmp_path / "run")
    wrong = with_settings(config, task=str(tmp_path / "absent.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        train(wrong)
    train(config)  # nothing was recorded, so nothing is lost
    with pytest.raises(ValueError, match=r"other settings .*lr: "):
        train(with_settings(config, lr=1e-5))
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        train(config)


def test_settings_out_of_range_are_refused(tiny_pair, tmp_path: Path) -> None:
    for changes, words in (
        ({"gamma": 1.2}, r"gamma is 1\.2; it must be in \[0, 1\]"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"objective": "magic"}, "unknown objective 'magic'; known: sampled_token"),
        ({"denominator": "magic"}, "unknown denominator 'magic'"),
        ({"gamma": 0.5, "objective": "teacher_topk"}, "no effect"),
    ):
        with pytest.raises(ValueError, match=words):
            train(settings(tiny_pair, tmp_path / "run", **changes))


def test_a_killed_run_continues_as_if_it_never_was(tiny_pair, tmp_path: Path) -> None:
    """SIGKILL a real process at an arbitrary moment, twice, then run to the end."""
    config = settings(tiny_pair, tmp_path / "killed", steps=8, save_every=1)
    rows_path = tmp_path / "killed" / "rows.jsonl"
    for count in (2, 5):
        process = start_process(tmp_path, train, config)
        deadline = time.monotonic() + 120
        while not rows_path.exists() or len(rows_path.read_text().splitlines()) < count:
            assert process.exit_code is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.process.kill()
        assert process.wait() == -signal.SIGKILL
        for checkpoint in (tmp_path / "killed" / "checkpoints").glob("step_*[0-9]"):
            for shard in (checkpoint / "optimizer").iterdir():
                moments = {k: x for k, x in load_file(shard).items() if "exp_avg_sq" in k}
                assert all(x.isfinite().all() and (x >= 0).all() for x in moments.values())
                assert any(x.any() for x in moments.values())
    finished_process = run_process(tmp_path, train, config)
    assert finished_process.exit_code == 0, finished_process.stderr
    reference = train(settings(tiny_pair, tmp_path / "whole", steps=8, save_every=1)).folder
    assert rows(tmp_path / "killed") == rows(reference)
    final = [
        (d / "final" / "model.safetensors").read_bytes() for d in (reference, rows_path.parent)
    ]
    assert final[0] == final[1]


def train_limited(config: Config, limit: int) -> None:
    with file_size_limit(limit):
        train(config)


@pytest.fixture(scope="module")
def six_steps(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("six") / "whole"
    return train(settings(tiny_pair, folder, steps=6, save_every=1)).folder


def test_a_continued_run_that_ends_before_its_last_model_is_saved_saves_it_later(
    tiny_pair, tmp_path: Path
) -> None:
    """Killed between the last checkpoint and final/, it still has the model of fewer steps."""
    config = settings(tiny_pair, tmp_path / "run", steps=1, save_every=1)
    final = train(config).folder / "final"
    shutil.copytree(final, tmp_path / "earlier")
    train(with_settings(config, steps=2))
    expected = (final / "model.safetensors").read_bytes()
    shutil.rmtree(final)
    shutil.copytree(tmp_path / "earlier", final)
    assert (final / "model.safetensors").read_bytes() != expected
    train(with_settings(config, steps=2))
    assert (final / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("limit", [2_000, 60_000, 200_000])
def test_a_full_disk_is_named_and_loses_nothing(
    tiny_pair, six_steps: Path, tmp_path: Path, limit: int
) -> None:
    """No file may exceed `limit` bytes: writing rows, then weights, then the optimizer fails."""
    config = settings(tiny_pair, tmp_path / "full", steps=6, save_every=1)
    process = run_process(tmp_path, train_limited, config, limit)
    assert process.exit_code != 0
    last_line = process.stderr.strip().splitlines()[-1]
    assert "OperationFailed: " in last_line
    assert "the disk is probably full" in last_line
    assert not list((tmp_path / "full").rglob("*.part/*"))
    assert rows(train(config).folder) == rows(six_steps)
    final = [
        (d / "final" / "model.safetensors").read_bytes() for d in (six_steps, tmp_path / "full")
    ]
    assert final[0] == final[1]


def test_running_out_of_memory_names_the_settings_to_lower(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd.training import train as trainer

    run_step = trainer.run_step

    def starved(state, step: int, log):
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return run_step(state, step, log)

    config = settings(tiny_pair, tmp_path / "run", max_tokens_per_microbatch=321, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "run_step", starved)
        with pytest.raises(
            RuntimeError, match=r"lower max_tokens_per_microbatch \(321\).*same command to resume"
        ):
            train(config)
    reference = train(settings(tiny_pair, tmp_path / "whole")).folder
    assert rows(train(config).folder) == rows(reference)


def test_code_beside_the_weights_runs_only_if_it_is_trusted(
    tiny_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose modelling code creates a file when it is imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(tiny_pair[0], folder)
    model_code = (
        "from transformers import Qwen2Config, Qwen2ForCausalLM\nclass Own(Qwen2ForCausalLM): ...\n"
    )
    model_code += (
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\nOwn.config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n{model_code}")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        train(settings((folder, tiny_pair[1]), tmp_path / "run"))
    assert not mark.exists()
    run = train(
        settings((folder, tiny_pair[1]), tmp_path / "run", trust_remote_code=True, steps=1)
    ).folder
    assert mark.exists()

    def forget_code() -> None:
        mark.unlink()
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]

    forget_code()
    examine = partial(DoctorOptions, prompts=1, group=1, max_response=2)
    assert read_config(run / "config.json").hardware.trust_remote_code
    for command in (
        lambda **options: probe_own_prefix(run, 2, **options),
        partial(probe_continuation, run, [0], 2),
        lambda: run_checks(examine(config=run / "config.json")),
        lambda: run_checks(examine(student=str(folder), teacher=str(tiny_pair[1]))),
    ):
        with pytest.raises(InvalidInput, match=r"add --trust-remote-code to the command"):
            command()  # the record, which may be a stranger's, counts for nothing
        assert not mark.exists()
    # nor does what a run was allowed bind it
    with pytest.raises(InvalidInput, match=r"add --trust-remote-code"):
        train(settings((folder, tiny_pair[1]), run, steps=2))
    assert not mark.exists()
    probe_own_prefix(run, 2, trust_remote_code=True)
    assert mark.exists()
    forget_code()
    run_checks(examine(config=run / "config.json", trust_remote_code=True))
    assert mark.exists()
    forget_code()
    run_checks(examine(student=str(folder), teacher=str(tiny_pair[1]), trust_remote_code=True))
    assert mark.exists()
