"""Figures of run folders: their tables equal plain loops, and pictures show what tables say."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.catalogue import FULL
from diagnostics.core.distribution_stats import functionals
from diagnostics.monitor import Monitor
from diagnostics.records import rows, vocabulary
from diagnostics.records import run_folders as folders
from figures.collect.tokens import tokens
from figures.runs import (
    anatomy,
    fan,
    heatmap,
    ledger,
    lorenz,
    pairs,
    quadrants,
    sampler,
    signal_loss,
    tokenizer,
    warning,
)
from opd.lab.build import make_tokenizer
from tests.helpers.dense_batches import Dense, dense

STEPS = (0, 3)
METHODS = {"plain": (0, 1), "other": (2,)}


def batches(seed: int) -> dict[int, Dense]:
    return {step: dense(seed=10 * seed + step, gap=1.5, sharpness=3.0) for step in STEPS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders with batches whose whole distributions are known, and the rows of them."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    monitor = Monitor(FULL)
    for method, seeds in METHODS.items():
        for seed in seeds:
            run = folder / f"{method}-{seed}"
            (run / "batches").mkdir(parents=True)
            settings = {"seed": seed, "student": "pair", "teacher": "pair", "objective": method}
            (run / "config.json").write_text(json.dumps(settings))
            for step, made in batches(seed).items():
                made.batch.save(folders.batch_path(run, step))
                rows.append(run / "rows.jsonl", {"step": step, **monitor(step, [made.batch])})
            make_tokenizer().save_pretrained(run / "final")
            found.append(run)
    make_tokenizer().save_pretrained(folder / "pair")
    return found


def everything(runs: list[Path], step: int) -> list[dict]:
    """Every supervised token by a plain loop, from the whole distributions."""
    found = []
    for run in runs:
        seed = int(run.name.split("-")[1])
        made = batches(seed)[step]
        batch = made.batch
        for i, t in made.tokens():
            p, q, y = made.p[i, t].exp(), made.q[i, t].exp(), int(batch.tokens[i, t])
            own = [int(batch.tokens[i, u]) for u in range(t + 1) if batch.mask[i, u]]
            grams = [tuple(own[j : j + 8]) for j in range(len(own) - 7)]
            cost = float((p[y] / q[y]).log())
            score = -p.clone()
            score[y] += 1
            found.append(
                {
                    "cluster": (seed, int(batch.prompt[i])),
                    "position": t,
                    "id": y,
                    "ended": bool(batch.ended[i]),
                    "cost": cost,
                    "energy": cost**2 * float(score.square().sum()),
                    "repeated": len(grams) > 0 and grams[-1] in grams[:-1],
                    "impossible": float(p[y]) > 0.9 and float(q[y]) < 1e-4,
                    "entropy": -float((p * p.log()).sum()),
                    "kl": float((p * (p / q).log()).sum()),
                    "surprise": -float(p[y].log()),
                    "surprise_variance": float((p * p.log() ** 2).sum())
                    - float((p * p.log()).sum()) ** 2,
                }
            )
    return found


def test_tokens_are_those_of_the_batches(made: list[Path]) -> None:
    data, want = tokens(made[:2], 3), everything(made[:2], 3)
    assert len(data) == len(want)
    for name in ("position", "id", "ended", "repeated", "impossible"):
        assert data[name].tolist() == [row[name] for row in want], name
    for name, column in (("cost", "cost"), ("energy", "energy"), ("student_entropy", "entropy")):
        assert np.allclose(data[name], [row[column] for row in want], rtol=1e-9), name
    together = {(a, row["cluster"]) for a, row in zip(data["cluster"], want, strict=True)}
    assert len(together) == data["cluster"].nunique() == len({row["cluster"] for row in want})


def test_the_ledger_counts_each_token_once(made: list[Path]) -> None:
    table = ledger.collect(made)
    start = [row["entropy"] for row in everything(made[:2], 0)]
    least = float(np.quantile(start, 0.8))

    def kind(row: dict) -> str:
        if row["id"] < 5:  # the lab tokenizer's special tokens come first
            return "special"
        if row["repeated"]:
            return "repeated"
        if row["impossible"]:
            return "excluded"
        return "uncertain" if row["entropy"] > least else "rest"

    mine = table[(table["method"] == "plain") & (table["step"] == 3)]
    want = everything(made[:2], 3)
    kinds = {kind(row) for row in want}
    assert {"special", "uncertain", "rest"} <= kinds
    for quantity, weigh in (("energy", lambda row: row["energy"]), ("tokens", lambda _: 1.0)):
        at = mine[mine["quantity"] == quantity].set_index("kind")
        assert set(at.index) == kinds
        for name in kinds:
            part = sum(weigh(row) for row in want if kind(row) == name)
            share = part / sum(weigh(row) for row in want)
            assert at.loc[name, "value"] == pytest.approx(share, rel=1e-4)
            assert at.loc[name, "low"] <= share * 1.0001
            assert at.loc[name, "high"] >= share * 0.9999
    e = np.array([row["energy"] for row in want])
    spread = mine[mine["quantity"] == "n_eff_share"]["value"].item()
    assert spread == pytest.approx(e.sum() ** 2 / (e**2).sum() / len(e), rel=1e-4)
    figure = ledger.draw(table)
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    energy = table[(table["method"] == "plain") & (table["quantity"] == "energy")]
    assert sum(bars) == pytest.approx(len(STEPS), abs=1e-3)
    assert set(np.round(energy["value"], 5)) <= set(np.round(bars, 5))


def test_a_token_is_of_the_first_kind_that_it_is() -> None:
    names = ("special", "repeated", "excluded", "uncertain", "rest")
    data = pd.DataFrame(
        {
            "id": [1, 9, 9, 9, 9],
            "repeated": [True, True, False, False, False],
            "impossible": [True, True, True, False, False],
            "student_entropy": [2.0, 2.0, 2.0, 2.0, 0.5],
        }
    )
    assert ledger.classes(data, frozenset({1}), 1.0).tolist() == list(names) == [*ledger.KINDS]


def test_special_tokens_are_those_of_the_tokenizer(made: list[Path]) -> None:
    data = tokens(made[:1], 0)
    special = vocabulary.read(made[0]).special
    assert special == frozenset(range(5))
    kinds = ledger.classes(data, special, np.inf)
    assert (kinds == "special").sum() == data["id"].isin(range(5)).sum() > 0
    assert not (ledger.classes(data, frozenset(), np.inf) == "special").any()


def test_lorenz_curves_take_the_largest_tokens_first(made: list[Path]) -> None:
    table = lorenz.collect(made)
    for quantity, size in (
        ("signal", lambda row: abs(row["cost"])),
        ("update", lambda row: row["energy"] ** 0.5),
    ):
        x = sorted((size(row) for row in everything(made[:2], 3)), reverse=True)
        at = table[(table["method"] == "plain") & (table["step"] == 3)]
        at = at[at["quantity"] == quantity]
        for share, value in zip(at["tokens"], at["value"], strict=True):
            count = share * len(x)
            whole = int(count)
            part = sum(x[:whole]) + (count - whole) * (x[whole] if whole < len(x) else 0)
            assert value == pytest.approx(part / sum(x), rel=2e-4, abs=1e-6)
        assert all(a <= b + 1e-9 for a, b in pairwise(at["value"]))
        assert (at["low"] <= at["value"] + 1e-4).all()
        assert (at["high"] >= at["value"] - 1e-4).all()
        row = rows.read(made[2] / "rows.jsonl")[0]
        single = table[(table["method"] == "other") & (table["step"] == 0)]
        single = single[(single["quantity"] == quantity) & (single["tokens"] == 0.01)]
        name = {"signal": "signal", "update": "energy"}[quantity]
        assert single["value"].item() == pytest.approx(
            row[f"signal/{name}_top1_share"], rel=0.05
        )  # the panel's histogram has levels 9 % wide


def test_equal_clusters_leave_no_interval() -> None:
    x = np.tile([4.0, 2.0, 1.0, 1.0], 6)
    value, low, high = lorenz.curve(x, np.repeat(np.arange(6), 4), np.random.default_rng(0))
    assert np.allclose(low, value)
    assert np.allclose(high, value)
    few = lorenz.GRID <= 0.25
    assert np.allclose(value[few], 2 * lorenz.GRID[few]), "a quarter of the tokens, half of it all"
    assert value[-1] == 1


def test_heat_maps_pool_runs_by_their_tokens(made: list[Path]) -> None:
    table = heatmap.collect(made)
    want = everything(made[:2], 3)
    mine = table[(table["method"] == "plain") & (table["step"] == 3)]
    for first, last in ((0, 1), (2, 3), (16, 31)):
        some = [row for row in want if first <= row["position"] <= last]
        at = mine[mine["first"] == first].set_index("quantity")
        assert at.loc["cost", "last"] == last
        assert at.loc["cost", "tokens"] == at.loc["cut", "tokens"] == len(some)
        assert at.loc["cost", "value"] == pytest.approx(
            np.mean([row["cost"] for row in some]), rel=1e-4
        )
        assert at.loc["cost_95", "value"] == pytest.approx(
            np.quantile([row["cost"] for row in some], 0.95), rel=1e-4
        )
        cut = np.mean([not row["ended"] for row in some])
        assert at.loc["cut", "value"] == pytest.approx(cut, abs=1e-4)
    figure = heatmap.draw(table)
    maps = [axes.collections[0] for axes in figure.axes if axes.get_xlabel() or axes.collections]
    tiles = [np.ravel(x.get_array()) for x in maps if x.get_array() is not None]
    drawn = np.ma.concatenate(tiles).compressed()
    assert set(np.round(mine["value"], 6)) <= set(np.round(drawn, 6))


def test_the_anatomy_adds_up_and_pools(made: list[Path]) -> None:
    table = anatomy.collect(made)
    whole = table[table["first"].isna() & (table["method"] == "plain") & (table["step"] == 3)]
    at = whole.set_index("part")
    assert at.loc["parts", "value"] == pytest.approx(
        at.loc[[*anatomy.PARTS], "value"].sum(), rel=1e-3
    )
    for part in (*anatomy.PARTS, "parts"):
        values = [rows.read(run / "rows.jsonl")[1] for run in made[:2]]
        n = np.array([row["divergence/tokens"] for row in values])
        x = np.array([row[f"divergence/kl_{part}"] for row in values])
        e = np.array([row[f"divergence/kl_{part}_se"] for row in values])
        assert at.loc[part, "value"] == pytest.approx((n * x).sum() / n.sum(), rel=1e-4)
        assert at.loc[part, "error"] == pytest.approx(
            np.sqrt((n**2 * e**2).sum()) / n.sum(), rel=1e-4
        )
    binned = table[(table["method"] == "plain") & (table["step"] == 3) & (table["first"] == 16)]
    assert binned["tokens"].iloc[0] == sum(
        16 <= row["position"] <= 31 for row in everything(made[:2], 3)
    )


def test_quadrants_hold_every_token_once(made: list[Path]) -> None:
    table = quadrants.collect(made)
    want = everything(made[:2], 3)
    start = everything(made[:2], 0)
    x, y = (float(np.quantile([row[c] for row in start], 0.8)) for c in ("entropy", "kl"))
    mine = table[(table["method"] == "plain") & (table["step"] == 3)]
    assert mine[mine["kind"] == "cell"]["tokens"].sum() == len(want)
    at = mine[mine["kind"] == "energy"].set_index("quadrant")
    for sure, apart in ((a, b) for a in (False, True) for b in (False, True)):
        name = f"{'undecided' if sure else 'decided'}, {'apart' if apart else 'near'}"
        some = [r for r in want if (r["entropy"] > x) == sure and (r["kl"] > y) == apart]
        share = sum(r["energy"] for r in some) / sum(r["energy"] for r in want)
        assert at.loc[name, "share"] == pytest.approx(share, rel=1e-3, abs=1e-6)
    figure = quadrants.draw(table)
    share = at.loc["undecided, apart", "share"]
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert any(f"{100 * share:.0f} % energy" in text for text in texts)
    counts = figure.axes[1].collections[0].get_array()
    assert np.nansum(np.ma.filled(counts, 0)) == len(want)


def test_the_sampler_check_tells_a_nucleus(made: list[Path]) -> None:
    data, want = tokens(made[:1], 3), everything(made[:1], 3)
    found = sampler.by_kind(data)
    for name, chosen in (
        ("all", lambda row: True),
        ("student undecided", lambda row: row["entropy"] >= 0.1),
        ("first 8 tokens", lambda row: row["position"] < 8),
    ):
        some = [row for row in want if chosen(row)]
        z = sum(row["surprise"] - row["entropy"] for row in some)
        variance = sum(row["surprise_variance"] for row in some)
        assert found[name] == pytest.approx((z / np.sqrt(variance), variance), rel=1e-6)
    assert abs(found["all"][0]) < 4
    likely = data.assign(student_logp=data["student_logp"].clip(lower=-1.0))
    assert sampler.by_kind(likely)["all"][0] < -4
    table = sampler.collect(made)
    first = rows.read(made[0] / "rows.jsonl")[0]["consistency/z_H@4-7"]
    position = table[(table["panel"] == "position") & (table["label"] == "4–7")]
    assert any(value == pytest.approx(first, rel=1e-4) for value in position["value"])
    figure = sampler.draw(table[table["method"] == "plain"])
    values = position[position["method"] == "plain"]["value"]
    diamonds = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "D"]
    together = values.sum() / np.sqrt(len(values))
    assert any(len(y) and y[0] == pytest.approx(together) for y in diamonds)
    halves = [sampler.by_kind(data[data["response"] % 2 == i])["all"] for i in (0, 1)]
    z, variance = (np.array(x) for x in zip(*halves, strict=True))
    assert sampler.joined(z, variance) == pytest.approx(found["all"][0])


def test_ending_has_the_mean_that_it_estimates() -> None:
    """Every token in its turn, weighed by p: the estimate averages to the whole probability."""
    v, k, end = 7, 3, 5
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1, 6, v, generator=g).double().mul(2).log_softmax(-1) for _ in range(2))
    ids = q.topk(k, -1).indices
    held = (ids == end).any(-1)[0]
    assert held.any()
    assert not held.all()
    for role, w in (("student", p), ("teacher", q)):
        mean = torch.zeros(6).double()
        for y in range(v):
            token = torch.full((1, 6), y)
            batch = ScoredRollouts(
                tokens=token,
                mask=torch.ones(1, 6, dtype=torch.bool),
                sampler_logp=p[..., y],
                prompt=torch.zeros(1, dtype=torch.long),
                ended=torch.ones(1, dtype=torch.bool),
                student_logp=p[..., y],
                teacher_logp=q[..., y],
                support=Support(
                    ids=ids,
                    student_logp=p.gather(-1, ids),
                    teacher_logp=q.gather(-1, ids),
                    source="teacher",
                ),
                prefix=DistributionStats(**functionals(p, q, token)),
            )
            mean += p[0, :, y].exp() * tokenizer.ending(batch, end, role)[0]
        assert torch.allclose(mean, w[0, :, end].exp(), rtol=1e-10)


def test_the_tokenizer_sheet_names_what_the_teacher_excludes(made: list[Path]) -> None:
    data = tokens(made[:2], 0)
    data["impossible"] = (data["cost"] > 2) & (data["id"] < 9)
    found = tokenizer.impossible(data, np.random.default_rng(0))
    size = data["cost"].abs().sum()
    for token, (value, low, high) in found.items():
        mine = data[data["impossible"] & (data["id"] == token)]
        assert value == pytest.approx(mine["cost"].abs().sum() / size)
        assert low <= value <= high
    assert set(found) == set(data[data["impossible"]]["id"])
    table = tokenizer.collect(made)
    assert set(tokenizer.ENDS) <= set(table["kind"])
    end = make_tokenizer().eos_token_id
    hazard = table[(table["kind"] == "student") & (table["first"] == 16) & (table["step"] == 0)]
    parts = []
    for made_batch in (batches(seed)[0] for seed in METHODS["plain"]):
        chosen = [(i, t) for i, t in made_batch.tokens() if 16 <= t <= 31]
        estimate = tokenizer.ending(made_batch.batch, end, "student")
        parts += [float(estimate[i, t]) for i, t in chosen]
    if len(parts) >= tokenizer.THIN:
        value = hazard[hazard["method"] == "plain"]["value"].item()
        assert value == pytest.approx(np.mean(parts), rel=1e-3)


def test_names_of_ids_are_their_text() -> None:
    lab = make_tokenizer()
    parsed = vocabulary.parse(json.loads(lab.backend_tokenizer.to_str()))
    for text in ("a", "7", "é", "é"[0]):
        ids = lab.encode(text)
        data = text.encode()
        names = [data[i : i + 1].decode("utf-8", "backslashreplace") for i in range(len(data))]
        assert [parsed.name(i) for i in ids] == names
    assert parsed.name(lab.encode(" ")[0]) == "␣"
    assert parsed.name(lab.encode("\n")[0]) == "⏎"
    assert parsed.name(lab.eos_token_id) == "<|im_end|>"
    assert parsed.name(10**6) == "#1000000"
    assert sorted(vocabulary.byte_letters().values()) == list(range(256))


def outcome(step: int, reward: float, cut: float, entropy: float) -> dict:
    row = {"step": step, "response/reward": reward, "response/truncated_share": cut}
    return row | {"divergence/student_entropy": entropy, "response/truncated_share_se": 0.01}


def test_a_collapse_is_told_from_outcomes_and_the_lead_from_it(tmp_path: Path) -> None:
    g, found = np.random.default_rng(0), []
    for seed in range(4):
        run = tmp_path / f"{'good' if seed < 3 else 'bad'}-{seed}"
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"seed": seed}))
        for step in range(20):
            bad = seed == 3
            row = outcome(
                step,
                0.2 if bad and step >= 12 and step != 13 else 0.6,
                0.9 if bad and step >= 15 else 0.05 + 0.01 * g.random(),
                1 + 0.1 * g.normal() + (5 if bad and step >= 9 else 0),
            )
            rows.append(run / "rows.jsonl", row)
        found.append(run)
    assert warning.collapse(rows.read(found[0] / "rows.jsonl")) is None
    assert warning.collapse(rows.read(found[3] / "rows.jsonl")) == 14  # 12 alone is no collapse
    table = warning.collect(found)
    assert set(table["kind"]) == {"healthy", "bad"}
    near = [row for run in found[:3] for row in rows.read(run / "rows.jsonl")]
    near = np.array([x["divergence/student_entropy"] for x in near if 5 <= x["step"] <= 9])
    entropy = table[table["indicator"] == "divergence/student_entropy"]
    bad = entropy[(entropy["run"] == "bad-3") & (entropy["step"] == 7)]
    z = (bad["value"].item() - near.mean()) / near.std(ddof=1)
    assert bad["z"].item() == pytest.approx(z, abs=0.01)
    kept = entropy[entropy["kind"] == "healthy"]
    assert len(kept) < 20 < len(entropy), "of healthy runs what went off, and the first step"
    assert set(kept["run"]) == {"good-0", "good-1", "good-2"}
    texts = [text.get_text() for text in warning.draw(table).axes[0].texts]
    assert "5 [1/1, 0/3]" in texts, "9 to 14, in one of one, and in no healthy run"
    with pytest.raises(ValueError, match="3 of 3 runs are healthy"):
        warning.collect(found[:3])


def test_the_control_is_paired_by_prompt(made: list[Path]) -> None:
    run = made[0]
    with pytest.raises(FileNotFoundError, match="opd probe-own-prefix"):
        fan.collect([run])
    all_batches = {"teacher": dense(5), "student": dense(6), "trained": dense(7)}
    for name, some in all_batches.items():
        some.batch.save(run / "control" / f"{name}.safetensors")
    table = fan.collect([run])
    doubts = {}
    for name, some in all_batches.items():
        chosen = [(i, t) for i, t in some.tokens() if 4 <= t <= 7]
        doubts[name] = np.mean([1 - float(some.q[i, t].exp().max()) for i, t in chosen])
        at = table[(table["source"] == name) & (table["first"] == 4)].set_index("quantity")
        assert at.loc["doubt", "value"] == pytest.approx(doubts[name], rel=1e-4)
        assert at.loc["doubt", "tokens"] == len(chosen)
        entropy = np.mean([-float((some.q[i, t].exp() * some.q[i, t]).sum()) for i, t in chosen])
        assert at.loc["teacher_entropy", "value"] == pytest.approx(entropy, rel=1e-4)
    own = pd.DataFrame({"prompt": np.arange(9).repeat(3), "bin": 2, "doubt": 0.1})
    own["doubt"] += np.arange(9).repeat(3)  # prompts differ much, the gap hardly
    other = own.assign(doubt=own["doubt"] + 0.5)
    (gap,) = fan.gaps(own, other, np.random.default_rng(0))
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (gap["first"], gap["last"], gap["tokens"]) == (4, 7, 27)
    longer = other.iloc[np.repeat(np.arange(27), np.arange(27) % 5 + 1)]
    (gap,) = fan.gaps(own, longer, np.random.default_rng(0))
    assert gap["value"] == pytest.approx(longer["doubt"].mean() - own["doubt"].mean(), rel=1e-4)


def test_signal_and_loss_are_the_probes(tmp_path: Path) -> None:
    run = tmp_path / "probed-0"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 0}))
    for step, signal in enumerate((4.0, None, -0.5)):
        row = {"step": step, "divergence/reverse_kl": 0.5, "divergence/reverse_kl_se": 0.1}
        if signal is not None:
            row |= {"gradient/signal": signal}
            row |= {"gradient/signal_low": signal - 1, "gradient/signal_high": signal + 1}
        rows.append(run / "rows.jsonl", row)
    table = signal_loss.collect([run])
    assert table["step"].tolist() == [0, 2]
    assert table["ratio"].tolist() == [4.0, -0.5]
    figure = signal_loss.draw(table)
    floor = 4.0 / 3
    marked = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert len(marked) == 1, "the interval of the second reaches 0"
    assert figure.axes[0].lines[0].get_ydata().tolist() == [4.0, floor]
    (run / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="--probe-every"):
        signal_loss.collect([run])


def test_pairs_show_the_same_numbers(made: list[Path]) -> None:
    table = pairs.collect([made[2]])
    want = everything([made[2]], 0)
    dots = table[table["panel"] == "scatter"]
    assert len(dots) == min(pairs.SCATTERED, len(want))
    costs = sorted(np.log(dots["x"] / dots["y"]))
    assert np.allclose(costs, sorted(row["cost"] for row in want), atol=0.02)
    some = [-row["cost"] for row in want if 16 <= row["position"] <= 31]
    at = table[(table["panel"] == "gap") & np.isclose(table["x"], np.sqrt(17 * 32), rtol=1e-3)]
    at = at.set_index("series")
    assert at.loc["mean", "y"] == pytest.approx(np.mean(some), rel=1e-3)
    assert at.loc["quantiles", "y"] == pytest.approx(np.median(some), rel=1e-3)
    assert at.loc["quantiles", "low"] == pytest.approx(np.quantile(some, 0.05), rel=1e-3)
    figure = pairs.draw(table)
    assert sorted(figure.axes[0].lines[0].get_xdata()) == sorted(dots["x"])


def test_folders_that_cannot_be_read_say_why(made: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        folders.methods([tmp_path])
    empty = tmp_path / "empty-0"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"seed": 0, "student": "nowhere"}))
    with pytest.raises(FileNotFoundError, match="--save-batch-every"):
        folders.saved([made[0], empty])
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        vocabulary.read(empty)
    assert list(folders.methods([*made, empty])) == ["plain", "other", "empty"]
