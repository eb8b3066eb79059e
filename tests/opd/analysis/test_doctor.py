"""`opd doctor` on real pairs on disk: a healthy pair, and one fault at a time."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.analysis import doctor, sample_checks
from opd.analysis.pair_checks import bos, load_side
from opd.analysis.sample_checks import Evidence
from opd.cli.doctor import main
from opd.config.files import to_toml
from opd.config.settings import Config, with_settings
from opd.data.chain_task import problems
from opd.lab.build import TEMPLATE, make_tokenizer, train_model
from opd.lab.configs import ToyModelConfig
from opd.teachers.pair import join_models
from tests.helpers.faulty_pairs import (
    END,
    OTHER,
    THINK,
    ModelPair,
    change_end_ids,
    double_bos,
    edit,
    edit_weights,
    fewer_rows,
    flatten_logits,
    halve_the_end,
    merge_in_one,
    name_the_end_otherwise,
    never_think,
    no_system_role,
    not_a_number,
    one_token_more,
    ordinary_think,
    other_template,
    other_turn_end,
    pad_with_the_end,
    padded_head,
    save,
    swap_two_ids,
    use_bos,
    write_template,
)

DIGIT = make_tokenizer().convert_tokens_to_ids("2")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    """Build a student that writes digits, and a slightly different teacher."""
    folder = tmp_path_factory.mktemp("healthy")
    network = train_model(
        make_tokenizer(), ToyModelConfig(layers=1, width=32, steps=60, batch=8, lr=2e-2), 0, "pair"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network.model.norm.weight.mul_(2)
        save(network, folder / "student")
        for weight in network.parameters():
            weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=generator))
    save(network, folder / "teacher")
    return folder / "student", folder / "teacher"


@pytest.fixture
def pair(healthy: ModelPair, tmp_path: Path) -> ModelPair:
    """Return a copy of the pair that a test may modify."""
    for folder in healthy:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "student", tmp_path / "teacher"


def examine(pair: ModelPair, **options: object) -> dict[str, object]:
    settings: dict[str, object] = {"task": "lab", "device": "cpu", "group": 1, "max_response": 48}
    settings |= options
    return {f.item: f for f in doctor.check_pair(*map(str, pair), **settings)}  # type: ignore[arg-type]


def verdicts(results: dict) -> dict[str, str]:
    return {item: f.verdict for item, f in results.items() if f.verdict != "ok"}


def test_a_healthy_pair_passes_and_exits_with_0(
    healthy: ModelPair, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*map(str, healthy), "--task", "lab", "--device", "cpu", "--max-response", "96"]
    main(arguments)
    output = capsys.readouterr().out
    assert "23 ok  0 warn  0 fail" in output
    assert "->" not in output
    main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "ok"
    assert [item["item"] for item in report["items"]] == list(examine(healthy))
    numbers = {item["item"]: item["numbers"] for item in report["items"]}
    assert numbers["endings"]["ended"] > 0
    assert numbers["impossible tokens"]["of"] > 500
    assert numbers["teacher noise"]["signal_rms"] > 0.01
    main([*map(str, healthy), "--device", "cpu", "--prompts", "2", "--max-response", "8"])


def test_a_file_of_settings_is_checked_with_its_models(
    healthy: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(student=str(healthy[0]), teacher=str(healthy[1]), out="o")
    config = with_settings(config, lr=-1.0, denominator="nothing", device="cpu", max_response=8)
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(config))
    sampling = ["--device", "cpu", "--prompts", "2", "--max-response", "8"]
    with pytest.raises(SystemExit):
        main(["--config", str(path), *sampling, "--json"])
    items = json.loads(capsys.readouterr().out)["items"]
    failed = [item["found"] for item in items if item["item"] == "settings"]
    assert len(failed) == 2
    assert failed[0].startswith("lr is -1.0")
    assert failed[1].startswith("unknown denominator")
    assert len({item["item"] for item in items}) > 5, "the models are checked too"
    path.write_text(to_toml(with_settings(config, lr=1.0, denominator="token_mean")))
    main(["--config", str(path), *sampling])
    assert "valid, and all of them have an effect" in capsys.readouterr().out
    for words in (["--config", str(path), "s", "t"], ["s"]):
        with pytest.raises(ValueError, match=r"--config names the models|give STUDENT and TEACHER"):
            main(words)


FAULTS: dict[str, tuple[Callable[[ModelPair], None], dict[str, str], str]] = {
    "swapped ids": (swap_two_ids, {"vocabulary": "fail"}, "2 of 261 ids.*'a' / 'b'"),
    "a token more": (one_token_more, {"vocabulary": "fail"}, "1 of 262 ids.*261: '' / '<tool>'"),
    "other merges": (merge_in_one, {"segmentation": "warn"}, "2 of 3 sample.*'et' .* / 'e' 't'"),
    "ordinary tag": (
        ordinary_think,
        {"special tokens": "warn"},
        "3 '<think>' is special for the student only",
    ),
    "another end": (
        lambda pair: change_end_ids(pair[1], OTHER),
        {"end tokens": "fail"},
        r"student ends with 1 '<\|im_end\|>', teacher with 2 '<\|endoftext\|>'",
    ),
    "one end more": (
        lambda pair: change_end_ids(pair[1], [END, OTHER]),
        {"end tokens": "warn"},
        r"teacher with 1 .* 2 ",
    ),
    "a config at odds": (
        lambda pair: [
            edit(f / "config.json", lambda c: c.update(eos_token_id=OTHER)) for f in pair
        ],
        {"end tokens": "warn"},
        r"config also ends with .*2 '<\|endoftext\|>'",
    ),
    "the turn ends otherwise": (
        other_turn_end,
        {"end tokens": "warn"},
        r"template ends a turn with 2 '<\|endoftext\|>'",
    ),
    "another template": (
        other_template,
        {"chat template": "warn"},
        r"one turn: 'sistant\\n' / 'sistant\\n<think>' at character 64; system: ",
    ),
    "a refusing template": (
        no_system_role,
        {"chat template": "warn"},
        "^system: the teacher's template rejects it .no system.$",
    ),
    "a template in one": (
        lambda pair: (pair[1] / "chat_template.jinja").unlink(),
        {"chat template": "warn"},
        "the teacher has no chat template",
    ),
    "doubled bos": (double_bos, {"bos": "warn"}, "adds another"),
    "pad ends": (pad_with_the_end, {"padding": "warn"}, "pad is 1 "),
    "pad is another end": (
        lambda pair: [change_end_ids(folder, [END, OTHER]) for folder in pair],
        {"padding": "warn"},
        "pad is 2 ",
    ),
    "padded head": (padded_head, {"head rows": "warn"}, "261 / 320.* last 59 of the teacher"),
    "rows missing": (fewer_rows, {"head rows": "fail"}, "261 / 258, tokens 261 / 261"),
    "babble": (flatten_logits, {"re-tokenisation": "warn"}, r"\d+ of 8 responses.*first: '"),
    "never think": (
        never_think,
        {"impossible tokens": "warn"},
        r"of the signal: 3 '<think>' x\d+$",
    ),
    "not a number": (
        not_a_number,
        {"sample": "fail", "student forward pass": "fail"},
        "logits are not finite",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_named_and_nothing_else(pair: ModelPair, name: str) -> None:
    apply_fault, expected, message = FAULTS[name]
    apply_fault(pair)
    results = examine(pair)
    assert verdicts(results) == expected
    item = next(iter(expected))
    assert re.search(message, results[item].found), results[item].found
    assert results[item].advice


def test_a_template_that_leaves_turns_open_names_no_end(pair: ModelPair) -> None:
    for folder in pair:
        write_template(folder, TEMPLATE.replace("<|im_end|>\n", ""))
    assert verdicts(examine(pair, max_response=4)) == {}


@pytest.mark.parametrize(
    ("template", "adds_bos", "verdict", "message"),
    [
        ("", False, "ok", "written by the template"),
        ("", True, "warn", "adds another"),
        ("{{ bos_token }}", False, "fail", "writes BOS twice"),
        ("Q:", False, "ok", "not in use"),
        ("Q:", True, "warn", "templated prompts have none"),
        (None, True, "ok", "added by the tokenizer"),
        (None, False, "ok", "not in use"),
    ],
)
def test_bos_is_counted(
    pair: ModelPair, template: str | None, adds_bos: bool, verdict: str, message: str
) -> None:
    (double_bos if adds_bos else lambda folders: use_bos(folders[0]))(pair)
    if template is None:
        (pair[0] / "chat_template.jinja").unlink()
    else:
        write_template(pair[0], template + TEMPLATE)
    side = load_side(str(pair[0]), "cpu", "float32")
    result = bos(side, side)
    assert result.verdict == verdict
    assert message in result.found


def test_a_failing_pair_exits_with_1(pair: ModelPair, capsys: pytest.CaptureFixture[str]) -> None:
    swap_two_ids(pair)
    with pytest.raises(SystemExit) as caught:
        main([*map(str, pair), "--task", "lab", "--device", "cpu", "--max-response", "8"])
    assert caught.value.code == 1
    output = capsys.readouterr().out
    assert "1 fail" in output
    assert "-> the teacher would score other text" in " ".join(output.split())


def test_no_end_token_and_no_room(pair: ModelPair, healthy_evidence: Evidence) -> None:
    results = examine(pair, budget=600)
    assert verdicts(results) == {"positions": "fail"}
    room = 512 - int(healthy_evidence.prompts.mask.sum(1).max())
    assert results["positions"].numbers["room"] == room
    edit(pair[1] / "config.json", lambda c: c.update(max_position_embeddings=1024))
    assert f"lower max_response to {room}," in results["positions"].advice
    assert verdicts(examine(pair, budget=room)) == {}
    results = examine(pair, budget=room + 1)
    assert verdicts(results) == {"positions": "fail"}
    assert results["positions"].found.endswith("exceed the positions of: student 512")
    for folder in pair:
        edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token=None))
        for file in ("config.json", "generation_config.json"):
            edit(folder / file, lambda c: c.update(eos_token_id=None))
    assert verdicts(examine(pair)) == {"end tokens": "fail", "sample": "fail"}
    with pytest.raises(ValueError, match="prompts is 0"):
        examine(pair, prompts=0)


def gather_pair_evidence(pair: ModelPair) -> Evidence:
    sides = [load_side(str(folder), "cpu", "float32") for folder in pair]
    chain_problems = problems("train", 6, 0)
    model_pair = join_models(sides[0].loaded, sides[1].name, sides[1].loaded)
    return sample_checks.gather_evidence(
        sides[0], sides[1], model_pair, chain_problems, group=2, max_response=180, seed=0
    )


@pytest.fixture(scope="module")
def healthy_evidence(healthy: ModelPair) -> Evidence:
    """A sample of the healthy pair, which tests may copy but not change."""
    return gather_pair_evidence(healthy)


def dense(folder: Path, evidence: Evidence) -> list[torch.Tensor]:
    """Return (length, V) log-probabilities of each response, computed alone and without padding."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder)
    logps = []
    for i in range(len(evidence.scored)):
        prompt = evidence.prompts.tokens[i][evidence.prompts.mask[i]]
        response = evidence.scored.tokens[i][evidence.scored.mask[i]]
        with torch.no_grad():
            logits = network(torch.cat([prompt, response])[None]).logits[0]
        logps.append(logits.log_softmax(-1)[len(prompt) - 1 : -1])
    return logps


def test_impossible_tokens_equal_a_loop(pair: ModelPair) -> None:
    never_think(pair)
    edit_weights(pair[1], lambda network: network.get_output_embeddings().weight[DIGIT].mul_(-3))
    evidence = gather_pair_evidence(pair)
    num_unsure = 0
    counts: dict[int, int] = {}
    impossible_signal, total_signal = 0.0, 0.0
    for i, (p, q) in enumerate(
        zip(dense(pair[0], evidence), dense(pair[1], evidence), strict=True)
    ):
        for t, v in enumerate(evidence.scored.tokens[i][evidence.scored.mask[i]].tolist()):
            r = abs(float(p[t, v] - q[t, v]))
            total_signal += r
            num_unsure += bool(p[t, v].exp() <= 0.5 and q[t, v].exp() < 1e-4)
            if p[t, v].exp() > 0.5 and q[t, v].exp() < 1e-4:
                counts[v], impossible_signal = counts.get(v, 0) + 1, impossible_signal + r
    numbers = sample_checks.impossible_tokens(evidence).numbers
    assert THINK in counts
    assert num_unsure > 0
    assert numbers["by_id"] == {str(v): n for v, n in counts.items()}
    assert numbers["signal_share"] == pytest.approx(impossible_signal / total_signal, rel=1e-4)


def test_another_end_id_is_distinguished_from_continuing(
    pair: ModelPair, healthy: ModelPair, healthy_evidence: Evidence
) -> None:
    name_the_end_otherwise(pair)
    results = examine(pair, group=2, max_response=180)
    assert verdicts(results)["end tokens"] == "fail"
    assert verdicts(results)["endings"] == "warn"
    assert "map its EOS (--map-eos)" in results["endings"].advice
    for folders, end_ids in ((pair, [OTHER]), (pair, [OTHER, END]), (healthy, [END])):
        if len(end_ids) > 1:
            change_end_ids(pair[1], end_ids)
            edit_weights(pair[1], halve_the_end)
        evidence = healthy_evidence if folders == healthy else gather_pair_evidence(folders)
        last_logps = [
            q[-1]
            for q, e in zip(dense(folders[1], evidence), evidence.scored.ended, strict=True)
            if e
        ]
        numbers = sample_checks.endings(evidence).numbers
        assert numbers["ended"] == len(last_logps) > 2
        student_end_logp = torch.stack([q[END] for q in last_logps]).mean()
        assert numbers["own"] == pytest.approx(float(student_end_logp), rel=1e-4)
        teacher_end_logp = torch.stack([q[end_ids].logsumexp(0) for q in last_logps]).mean()
        assert numbers["listed"] == pytest.approx(float(teacher_end_logp), rel=1e-4)


def with_hidden_states(pair: Any, hidden: Callable[..., torch.Tensor]) -> Any:
    """The pair with other hidden states of the teacher."""
    model = replace(pair.teacher.model, hidden=hidden)
    return replace(pair, teacher=replace(pair.teacher, model=model))


@pytest.mark.parametrize(
    ("size", "verdict"), [(0.0, "ok"), (1e-4, "ok"), (0.2, "warn"), (3.0, "fail")]
)
def test_a_teacher_that_depends_on_chance_is_found(
    healthy_evidence: Evidence, size: float, verdict: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    exact_teacher = healthy_evidence.pair.teacher.model

    def hidden(*inputs: torch.Tensor) -> torch.Tensor:
        states = exact_teacher.hidden(*inputs)
        return states + size * torch.randn(states.shape, generator=generator)

    noisy = replace(healthy_evidence, pair=with_hidden_states(healthy_evidence.pair, hidden))
    result = sample_checks.teacher_noise(noisy)
    assert result.verdict == verdict
    if size == 0:
        assert result.numbers["again_max"] == 0
        assert result.numbers["alone_max"] < 1e-4


def test_a_teacher_that_depends_on_its_batch_is_found(healthy_evidence: Evidence) -> None:
    evidence = healthy_evidence
    exact_teacher = evidence.pair.teacher.model

    def hidden(ids: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        return exact_teacher.hidden(ids, *arguments) * (1 + 0.02 * (len(ids) > 1))

    batch_dependent_pair = with_hidden_states(evidence.pair, hidden)
    num_tokens = evidence.prompts.tokens.numel() + evidence.rollouts.tokens.numel()
    scored = sample_checks.score_with_both(
        batch_dependent_pair, evidence.prompts, evidence.rollouts, num_tokens
    )
    result = sample_checks.teacher_noise(
        replace(evidence, pair=batch_dependent_pair, scored=scored)
    )
    assert result.verdict == "warn"
    assert result.numbers["again_max"] == 0
    scored_alone = sample_checks.score_with_both(
        evidence.pair, evidence.prompts, evidence.rollouts, 1
    )
    gap = (scored_alone.teacher_logp - scored.teacher_logp)[scored.mask].double()
    assert result.numbers["alone_rms"] == pytest.approx(float(gap.square().mean().sqrt()))
    r = scored.log_ratio[scored.mask].double()
    assert result.numbers["signal_rms"] == pytest.approx(float(r.square().mean().sqrt()))
