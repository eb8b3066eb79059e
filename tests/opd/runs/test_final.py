"""What final/ holds: adapters beside the merged model, a model card, and the upload to the hub."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from diagnostics.errors import InvalidInput, OperationFailed
from opd.cli.main import main
from opd.config.files import to_flat
from opd.config.settings import Config, TaskSettings, with_settings
from opd.runs.hub import check_push, push_model
from opd.runs.model_card import model_card
from opd.training.train import train
from tests.helpers.runs import settings
from tests.helpers.servers.hub import serve
from tests.helpers.warm_process import run_process


@pytest.fixture(scope="module")
def config(tiny_pair, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("final")
    data = folder / "sums.jsonl"
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings(
        tiny_pair,
        folder / "sums",
        task=str(data),
        steps=2,
        eval_every=0,
        lora_rank=2,
        system="Add | up",
        betas=(0.9, 0.95),
    )


@pytest.fixture(scope="module")
def run(config: Config) -> Path:
    return train(config).folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 14)[None]).logits


def test_the_adapters_on_the_base_model_are_the_merged_model(run: Path, tiny_pair) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_pair[0])
    untrained = logits(base)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "final"))
    on_base = PeftModel.from_pretrained(base, run / "final" / "adapter")
    torch.testing.assert_close(logits(on_base), merged, rtol=0, atol=1e-4)
    assert (merged - untrained).abs().max() > 1e-2
    by_name = AutoPeftModelForCausalLM.from_pretrained(run / "final" / "adapter")
    torch.testing.assert_close(logits(by_name), merged, rtol=0, atol=1e-4)
    assert "[More Information Needed]" not in (run / "final/adapter/README.md").read_text()


def table_rows(card: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose header begins with `head`."""
    lines = card.split(f"| {head}")[1].splitlines()[2:]
    end = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[:end]]
    return [[cell.strip() for cell in row] for row in cells]


def test_the_card_says_where_the_model_comes_from(run: Path, config: Config, tiny_pair) -> None:
    card = (run / "final" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert header["tags"] == ["on-policy-distillation", "opdlab", "lora"]
    assert "base_model" not in header, "a folder is no model of the hub"
    assert f"- base model: `{tiny_pair[0]}`" in card
    assert f"- teacher: `{tiny_pair[1]}`" in card
    assert f"- prompts: `{config.data.task}`" in card
    assert r"- system: `Add \| up`" in card
    values = dict(table_rows(card, "setting"))
    assert values["`lora_rank`"] == "`2`"
    assert values["`betas`"] == "`[0.9, 0.95]`"
    assert values["`objective`"] == "`teacher_topk`"
    assert "`weight_decay`" not in values
    evaluations = [json.loads(x) for x in (run / "evals.jsonl").read_text().splitlines()]
    for row, cells in zip(evaluations, table_rows(card, "step"), strict=True):
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        assert cells[:3] == [str(row["step"]), f"{row['accuracy']:.3f} {interval}", "4"]
    [start] = [json.loads(x) for x in (run / "starts.jsonl").read_text().splitlines()]
    assert f"- opdlab `{start['version']}`, commit `{start['commit']}`" in card
    for name, version in start["libraries"].items():
        assert f"- {name} `{version}`" in card
    assert "adapters of rank 2 are merged" in card.lower()


def test_the_card_names_parents_on_the_hub(run: Path, config: Config) -> None:
    tasks = (
        TaskSettings(name="a", task="hf:org/questions:train", teacher="org/teacher-a"),
        TaskSettings(name="b", task="lab", system="Think."),
    )
    named = with_settings(config, student="org/student", teacher="./teacher-b", tasks=tasks)
    card = model_card(run, to_flat(named))
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "org/student"
    assert header["datasets"] == ["org/questions"]
    assert header["teachers"] == ["org/teacher-a"]
    assert "- teacher of `b`: `./teacher-b`" in card
    assert "- system of `b`: `Think.`" in card


def push(run: Path, address: str) -> None:
    """Run `opd train --config RUN/config.json --push org/sums` in this process."""
    from huggingface_hub import constants

    # read from the environment on import, which was before the fork
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = address, False
    constants.HF_HUB_DISABLE_XET = True
    os.chdir(run)
    sys.argv = ["opd", "train", "--config", str(run / "config.json"), "--push", "org/sums"]
    main()


def test_a_finished_run_is_pushed_with_everything_in_final(run: Path, tmp_path: Path) -> None:
    with serve() as (address, hub):
        result = run_process(
            tmp_path, push, run, address, environment={"HF_TOKEN": "hf_secret"}, timeout=120
        )
    assert result.exit_code == 0, result.stderr
    assert f"uploaded: {address}/org/sums/commit/abc" in result.stdout
    [created] = hub.created
    assert created["name"] == "sums"
    assert created["organization"] == "org"
    assert created["visibility"] == "private"
    final = run / "final"
    on_disk = {
        str(path.relative_to(final)): path.read_bytes()
        for path in final.rglob("*")
        if path.is_file()
    }
    assert {"README.md", "model.safetensors", "adapter/adapter_model.safetensors"} <= on_disk.keys()
    assert hub.files == on_disk
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in result.stdout + result.stderr


def test_a_refused_upload_is_one_line_and_keeps_the_model(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(refuse=True) as (address, hub):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(
            OperationFailed, match=r"could not be uploaded to org/sums .*403"
        ) as error:
            push_model(run, "org/sums")
    assert "the same command with --push org/sums uploads it again" in str(error.value)
    assert "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value)
    assert not hub.files
    assert (run / "final" / "model.safetensors").exists()


def test_an_upload_that_cannot_succeed_is_refused_before_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InvalidInput, match="org/m needs a token with write access: run `hf auth"):
        check_push("org/m")
    with pytest.raises(InvalidInput, match="'a/b/c' is not the name of a repository; write OWNER"):
        check_push("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match="HF_HUB_OFFLINE is set; unset it"):
        check_push("org/m")
    with pytest.raises(FileNotFoundError, match="final does not exist; finish the run first"):
        push_model(tmp_path, "org/m")
