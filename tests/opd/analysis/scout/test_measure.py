"""The measurements of a pair against plain loops over whole logits, and what a scout refuses."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.gradients.sketch import identity_projection
from opd.analysis.scout import accuracies, columns, measure, special_tokens
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts, encode_prompts
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTINUATION, CONTROL, ROLLOUT, derive_seed
from opd.scoring.request import METRICS_ONLY, ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.pair import ModelPair, load_pair
from opd.training.probe import gradient_probe
from opd.training.setup import load_problem_task

PROMPTS, GROUP, RESPONSE = 10, 3, 24
GRADER = "def grade(response, answer):\n    return float(sum(map(ord, response)) % 3 == 0)\n"
"""Grades each response by its characters, so that both models are right at times."""


@pytest.fixture(scope="module")
def grader(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("grader") / "grader.py"
    path.write_text(GRADER)
    return f"{path}:grade"


def make_config(folders: tuple[Path, Path], grader: str, seed: int) -> Config:
    return with_settings(
        Config(student=str(folders[0]), teacher=str(folders[1]), out="scout", seed=seed),
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        max_prompt=64,
        max_response=RESPONSE,
        grader=grader,
        device="cpu",
    )


@pytest.fixture(scope="module")
def config(tiny_pair, grader: str) -> Config:
    return make_config(tiny_pair, grader, seed=3)


@pytest.fixture(scope="module")
def values(config: Config) -> Iterator[dict[str, float]]:
    """Measurements with the gradients themselves in the place of their sketches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gradient_probe,
            "random_projection",
            lambda vocabulary, hidden, seed: identity_projection(vocabulary, hidden),
        )
        yield dict(measure.measure_pair(config).values)


@pytest.fixture(scope="module")
def pair(tiny_pair) -> ModelPair:
    return load_pair(*map(str, tiny_pair), "cpu", "float32")


@pytest.fixture(scope="module", params=["tiny_pair", "two_layer_pair"])
def either_pair(request: pytest.FixtureRequest, grader: str) -> tuple[Config, ModelPair]:
    """A pair and a seed with which responses end with special tokens that end no response."""
    folders = request.getfixturevalue(request.param)
    return make_config(folders, grader, seed=7), load_pair(*map(str, folders), "cpu", "float32")


@pytest.fixture(scope="module")
def sampled(config: Config, pair: ModelPair) -> tuple[Prompts, Rollouts]:
    return sample_student(config, pair)


def sample_student(config: Config, pair: ModelPair) -> tuple[Prompts, Rollouts]:
    problems = load_problem_task(config, pair).train(0, PROMPTS)
    prompts = encode_prompts(pair.tokenizer, problems, GROUP, 64)
    return prompts, draw(config, pair.student, prompts, pair.eos, ROLLOUT, RESPONSE)


def draw(config: Config, model, prompts: Prompts, eos, purpose: int, budget: int) -> Rollouts:
    return sample(
        model,
        prompts,
        sorted(eos),
        max_response=budget,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive_seed(config.seed, 0, purpose)),
    )


def shorten(rollouts: Rollouts, lengths: dict[int, int]) -> Rollouts:
    """Cut the responses of some rows after so many tokens."""
    mask, ended = rollouts.mask.clone(), rollouts.ended.clone()
    for row, length in lengths.items():
        mask[row, length:], ended[row] = False, False
    return rollouts.with_fields(
        tokens=rollouts.tokens * mask,
        mask=mask,
        sampler_logp=rollouts.sampler_logp * mask,
        softmax_logp=None,
        ended=ended,
    )


def response_ids(rollouts: Rollouts) -> list[list[int]]:
    return [x[m].tolist() for x, m in zip(rollouts.tokens, rollouts.mask, strict=True)]


def prompt_ids(prompts: Prompts) -> list[list[int]]:
    return [x[m].tolist() for x, m in zip(prompts.tokens, prompts.mask, strict=True)]


@pytest.fixture(scope="module")
def dense(pair: ModelPair, sampled: tuple[Prompts, Rollouts]) -> list[list[dict[str, Tensor]]]:
    """Both models' whole distributions at each token of each response, one response at a time."""
    rows = []
    for prompt, response in zip(prompt_ids(sampled[0]), response_ids(sampled[1]), strict=True):
        ids, begin = torch.tensor([prompt + response]), len(prompt) - 1
        with torch.no_grad():
            student = pair.student.network(input_ids=ids, output_hidden_states=True)
            teacher = pair.teacher.model.network(input_ids=ids)
        rows.append(
            [
                {
                    "p": student.logits[0, begin + t].double().log_softmax(-1),
                    "q": teacher.logits[0, begin + t].double().log_softmax(-1),
                    "hidden": student.hidden_states[-1][0, begin + t].double(),
                    "token": torch.tensor(token),
                }
                for t, token in enumerate(response)
            ]
        )
    assert len(set(map(len, rows))) > 1, "the test needs responses that end before others"
    return rows


def grade(pair: ModelPair, ids: list[int]) -> float:
    """Grade what remains without the special tokens at the end, of which </think> is none."""
    texts = [pair.tokenizer.decode([i]) for i in ids]
    while texts and texts[-1] in {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>"}:
        texts.pop()
    return float(sum(map(ord, pair.tokenizer.decode(ids[: len(texts)]))) % 3 == 0)


def test_divergences_and_top_k_lists_are_those_of_whole_distributions(values, dense) -> None:
    flat = [token for row in dense for token in row]
    top = [{m: token[m].topk(32).indices.tolist() for m in "pq"} for token in flat]
    expected = {
        "reverse_kl": [float((x["p"].exp() * (x["p"] - x["q"])).sum()) for x in flat],
        "forward_kl": [float((x["q"].exp() * (x["q"] - x["p"])).sum()) for x in flat],
        "entropy_gap": [float((x["p"].exp() * x["p"] - x["q"].exp() * x["q"]).sum()) for x in flat],
        "sampled_gap": [abs(float((x["p"] - x["q"])[x["token"]])) for x in flat],
        "topk_overlap": [len({*x["p"][:16]} & {*x["q"][:16]}) / 16 for x in top],
        "teacher_mass": [
            float(x["q"][y["p"][:16]].exp().sum()) for x, y in zip(flat, top, strict=True)
        ],
        "outside_top8": [
            1 - float(x["p"][y["q"][:8]].exp().sum()) for x, y in zip(flat, top, strict=True)
        ],
        "outside_top32": [
            1 - float(x["p"][y["q"]].exp().sum()) for x, y in zip(flat, top, strict=True)
        ],
    }
    for name, column in expected.items():
        assert values[name] == pytest.approx(np.mean(column), rel=1e-3, abs=1e-6), name
    response_kl = np.array(expected["reverse_kl"]).sum() / len(dense)
    assert values["response_kl"] == pytest.approx(response_kl, rel=1e-3)
    assert values["length"] == pytest.approx(len(flat) / len(dense))


def test_special_tokens_and_their_gap(config: Config, values, pair: ModelPair, dense) -> None:
    special_ids = set(pair.tokenizer.all_special_ids) | {
        i for i, token in pair.tokenizer.added_tokens_decoder.items() if token.special
    }
    gaps: dict[bool, list[float]] = {True: [], False: []}
    by_id: dict[int, list[float]] = {}
    for token in (token for row in dense for token in row):
        r = float((token["p"] - token["q"])[token["token"]])
        gaps[int(token["token"]) in special_ids].append(r)
        by_id.setdefault(int(token["token"]), []).append(r)
    assert len(gaps[True]) >= 3, "the test needs special tokens"
    num_tokens = sum(map(len, gaps.values()))
    assert values["special_share"] == pytest.approx(len(gaps[True]) / num_tokens)
    assert values["special_gap"] == pytest.approx(np.mean(gaps[True]), rel=1e-3)
    assert values["plain_gap"] == pytest.approx(np.mean(gaps[False]), rel=1e-3)
    signal = {k: np.abs(v).sum() for k, v in gaps.items()}
    assert values["special_signal"] == pytest.approx(signal[True] / sum(signal.values()), rel=1e-3)
    rules = {share.rule: share for share in measure.measure_pair(config).rules}
    expected_ids = special_ids & by_id.keys()
    assert rules.keys() == {f"string:{pair.tokenizer.decode([v])}" for v in expected_ids}
    for v in expected_ids:
        share = rules[f"string:{pair.tokenizer.decode([v])}"]
        assert share.tokens == pytest.approx(len(by_id[v]) / num_tokens)
        assert share.gap == pytest.approx(np.mean(by_id[v]), rel=1e-3)
        part = np.abs(by_id[v]).sum() / sum(signal.values())
        assert share.signal == pytest.approx(part, rel=1e-3)
    assert [share.signal for share in rules.values()] == sorted(
        (share.signal for share in rules.values()), reverse=True
    )


def test_a_special_token_that_is_spelled_is_special_too(pair: ModelPair, sampled) -> None:
    prompts, rollouts = sampled
    spelled = pair.tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    pieces = [pair.tokenizer.encode(c, add_special_tokens=False)[0] for c in "<|im_end|>"]
    ids = [spelled[0], *pieces, spelled[-1]]
    tokens = rollouts.tokens[:1].clone()
    tokens[0, : len(ids)] = torch.tensor(ids)
    mask = torch.arange(tokens.shape[1])[None] < len(ids)
    row = rollouts.rows([0]).with_fields(
        tokens=tokens,
        mask=mask,
        sampler_logp=rollouts.sampler_logp[:1] * mask,
        softmax_logp=None,
        ended=torch.tensor([False]),
    )
    depth = measure.SUPPORT_K
    request = ScoreRequest(requirements=replace(METRICS_ONLY, support="union", support_k=depth))
    scored = score_batch(pair.student, pair.teacher, prompts.rows([0]), row, request).scored
    rules = special_tokens.special_rules(pair, scored)
    assert "string:<|im_end|>" in [rule.name for rule in rules]
    (share,) = special_tokens.rule_shares(scored, rules)
    r = scored.log_ratio[0, 1 : 1 + len(pieces)]
    assert share.tokens == pytest.approx(len(pieces) / len(ids))
    assert share.gap == pytest.approx(float(r.mean()), rel=1e-4)
    assert columns.metric_values(scored, rules)["special_share"] == pytest.approx(share.tokens)


def test_signal_to_noise_is_that_of_the_gradients_of_the_head(values, dense) -> None:
    """Signal from products of different prompts, variance of one response: plain loops."""
    gradients: dict[str, list[Tensor]] = {"snr": [], "snr_sequence": [], "snr_full_vocabulary": []}
    for row in dense:
        costs = torch.stack([(x["p"] - x["q"])[x["token"]] for x in row])
        sums = {name: torch.zeros(len(row[0]["p"]), 32, dtype=torch.float64) for name in gradients}
        for t, x in enumerate(row):
            p, ratio = x["p"].exp(), x["p"] - x["q"]
            one_hot = torch.nn.functional.one_hot(x["token"], len(p)).double()
            score = torch.outer(one_hot - p, x["hidden"])
            sums["snr"] += costs[t] * score
            sums["snr_sequence"] += costs[t:].sum() * score
            sums["snr_full_vocabulary"] += torch.outer(p * (ratio - p @ ratio), x["hidden"])
        for name, gradient in sums.items():
            gradients[name].append(gradient.flatten())
    for name, rows in gradients.items():
        products = torch.stack(rows) @ torch.stack(rows).T
        prompt = torch.arange(len(rows)) // GROUP
        signal = products[prompt[:, None] != prompt].mean()
        ratio = signal / (products.diagonal().mean() - signal)
        assert values[name] == pytest.approx(float(ratio), rel=1e-3), name


def test_accuracies_are_of_both_models_on_the_same_problems(
    either_pair: tuple[Config, ModelPair],
) -> None:
    config, pair = either_pair
    prompts, rollouts = sample_student(config, pair)
    correct = np.array([grade(pair, ids) for ids in response_ids(rollouts)])
    first_prompts = prompts.rows(list(range(0, len(prompts), GROUP)))
    eos = {*pair.eos, *pair.teacher.eos}
    teacher_rollouts = draw(config, pair.teacher.model, first_prompts, eos, CONTROL, RESPONSE)
    responses = response_ids(teacher_rollouts)
    teacher = np.array([grade(pair, ids) for ids in responses])
    assert 0 < correct.mean() != teacher.mean() > 0, "the test needs both models to be right"
    special_ids = {*pair.tokenizer.all_special_ids} - eos
    assert any(ids[-1] in special_ids for ids in responses), "the test needs special tokens last"
    values = measure.measure_pair(config).values
    assert values["student_accuracy"] == pytest.approx(correct.mean())
    assert values["teacher_accuracy"] == pytest.approx(teacher.mean())
    assert values["accuracy_gap"] == pytest.approx(teacher.mean() - correct.mean())
    for name in ("student_accuracy", "teacher_accuracy", "accuracy_gap"):
        assert values[f"{name}_low"] < values[name] < values[f"{name}_high"]


def test_the_teacher_continues_the_first_response_to_each_problem(
    either_pair: tuple[Config, ModelPair],
) -> None:
    config, pair = either_pair
    prompts, rollouts = sample_student(config, pair)
    rollouts = shorten(rollouts, {0: 3, 3: 2, 12: 1})
    responses = response_ids(rollouts)
    correct = np.array([grade(pair, ids) for ids in responses]).reshape(PROMPTS, GROUP)
    length = sorted(map(len, responses))[(len(responses) - 1) // 2] // 2
    rows = [i for i in range(0, len(responses), GROUP) if len(responses[i]) > length]
    assert rows == [6, 9, 15, 18, 21, 24, 27], "the test needs responses that end before the prefix"
    prefixes = [responses[i][:length] for i in rows]
    longer_prompts = Prompts.from_ids(
        [prompt_ids(prompts)[i] + prefix for i, prefix in zip(rows, prefixes, strict=True)],
        torch.arange(len(rows)),
    )
    eos = {*pair.eos, *pair.teacher.eos}
    task = load_problem_task(config, pair)
    first_prompts = encode_prompts(pair.tokenizer, task.train(0, PROMPTS), 1, 64)
    gains = set()
    for seed in (config.seed, 4, 5, 6):
        seeded = with_settings(config, seed=seed)
        continued = draw(
            seeded, pair.teacher.model, longer_prompts, eos, CONTINUATION, RESPONSE - length
        )
        expected = np.mean(
            [
                grade(pair, prefix + ids) - grade(pair, responses[i])
                for i, prefix, ids in zip(rows, prefixes, response_ids(continued), strict=True)
            ]
        )
        values = accuracies.continuation_values(
            seeded, pair, task, first_prompts, rollouts, correct
        )
        assert values["continuation_gain"] == pytest.approx(expected)
        gains.add(expected)
    assert values["continuation_length"] == length > 0
    assert len(gains) > 1, "the test needs gains that depend on what the teacher writes"


def test_equal_seeds_give_equal_numbers_and_folders_may_be_paths(tiny_pair) -> None:
    runs = [
        measure.pair_measurements(*tiny_pair, max_prompt=64, max_response=4, rollouts=32, seed=s)
        for s in (0, 0, 1)
    ]
    assert repr(runs[0]) == repr(runs[1])
    assert runs[0]["reverse_kl"] != runs[2]["reverse_kl"]
    assert (runs[0]["prompts"], runs[0]["responses"]) == (8, 32)
    assert set(columns.COLUMNS) <= set(runs[0])
    assert all(math.isfinite(runs[0][name]) for name in columns.COLUMNS if name != "special_gap")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "http://localhost:8000/v1"}, "loaded in this process"),
        ({"teacher": "base"}, "loaded in this process"),
        ({"teacher": "cache:scores"}, "loaded in this process"),
        ({"task": "env:household"}, "is a game"),
    ],
)
def test_a_scout_refuses(config: Config, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        measure.measure_pair(with_settings(config, **changes))


def test_equal_models_too_few_prompts_and_missing_answers_are_refused(
    config: Config, tiny_pair, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="nothing to distil"):
        measure.measure_pair(with_settings(config, teacher=config.student))
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in Path(config.student).iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidInput, match="nothing to distil"):
        measure.measure_pair(with_settings(config, teacher=str(copied)))
    with pytest.raises(InvalidInput, match=r"rollouts is 4, .* and so enough for 1 of the 8"):
        measure.pair_measurements(*tiny_pair, rollouts=4)
    few_problems = tmp_path / "few.jsonl"
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in range(4)]
    few_problems.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InvalidInput, match="3 different prompts"):
        measure.measure_pair(with_settings(config, task=str(few_problems)))
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text("\n".join(json.dumps({"prompt": f"{i}+1"}) for i in range(40)))
    with pytest.raises(InvalidInput, match="no answers"):
        measure.measure_pair(with_settings(config, task=str(unanswered), answer_column=""))
