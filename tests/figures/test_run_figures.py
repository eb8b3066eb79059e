"""Figures of run folders: tables equal those of plain loops, and figures show their values."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.catalogue import FULL
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.monitor import Monitor
from diagnostics.records import rows
from diagnostics.records.run_folder import RunFolder
from diagnostics.records.run_groups import common_saved_steps, group_by_method
from diagnostics.records.vocabulary import load_run_vocabulary, tokenizer_vocabulary
from figures.collect.tokens import token_table
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
from tests.helpers.dense_batches import DenseBatch, make_dense_batch

STEPS = (0, 3)
METHODS = {"plain": (0, 1), "other": (2,)}


def dense_batches(seed: int) -> dict[int, DenseBatch]:
    return {step: make_dense_batch(seed=10 * seed + step, gap=1.5, sharpness=3.0) for step in STEPS}


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write run folders with rows and batches whose full distributions are known."""
    folder, run_folders = tmp_path_factory.mktemp("runs"), []
    monitor = Monitor(FULL)
    for method, seeds in METHODS.items():
        for seed in seeds:
            run = folder / f"{method}-{seed}"
            (run / "batches").mkdir(parents=True)
            settings = {"seed": seed, "student": "pair", "teacher": "pair", "objective": method}
            (run / "config.json").write_text(json.dumps(settings))
            for step, dense_batch in dense_batches(seed).items():
                dense_batch.batch.save(RunFolder(run).batch_path(step))
                rows.append_row(
                    run / "rows.jsonl", {"step": step, **monitor(step, [dense_batch.batch])}
                )
            make_tokenizer().save_pretrained(run / "final")
            run_folders.append(run)
    make_tokenizer().save_pretrained(folder / "pair")
    return run_folders


def expected_tokens(runs: list[Path], step: int) -> list[dict]:
    """Compute every supervised token in a plain loop from the full distributions."""
    expected = []
    for run in runs:
        seed = int(run.name.split("-")[1])
        dense_batch = dense_batches(seed)[step]
        batch = dense_batch.batch
        for i, t in dense_batch.tokens():
            p, q, y = dense_batch.p[i, t].exp(), dense_batch.q[i, t].exp(), int(batch.tokens[i, t])
            supervised_ids = [int(batch.tokens[i, u]) for u in range(t + 1) if batch.mask[i, u]]
            grams = [tuple(supervised_ids[j : j + 8]) for j in range(len(supervised_ids) - 7)]
            cost = float((p[y] / q[y]).log())
            score = -p.clone()
            score[y] += 1
            expected.append(
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
    return expected


def test_tokens_are_those_of_the_batches(saved_runs: list[Path]) -> None:
    data, expected = token_table(saved_runs[:2], 3), expected_tokens(saved_runs[:2], 3)
    assert len(data) == len(expected)
    for name in ("position", "id", "ended", "repeated", "impossible"):
        assert data[name].tolist() == [row[name] for row in expected], name
    for name, column in (("cost", "cost"), ("energy", "energy"), ("student_entropy", "entropy")):
        assert np.allclose(data[name], [row[column] for row in expected], rtol=1e-9), name
    cluster_pairs = {(a, row["cluster"]) for a, row in zip(data["cluster"], expected, strict=True)}
    assert (
        len(cluster_pairs) == data["cluster"].nunique() == len({row["cluster"] for row in expected})
    )


def test_the_ledger_counts_each_token_once(saved_runs: list[Path]) -> None:
    table = ledger.collect(saved_runs)
    start = [row["entropy"] for row in expected_tokens(saved_runs[:2], 0)]
    threshold = float(np.quantile(start, 0.8))

    def kind(row: dict) -> str:
        if row["id"] < 5:  # the lab tokenizer's special tokens come first
            return "special"
        if row["repeated"]:
            return "repeated"
        if row["impossible"]:
            return "excluded"
        return "uncertain" if row["entropy"] > threshold else "rest"

    plain_rows = table[(table["method"] == "plain") & (table["step"] == 3)]
    expected = expected_tokens(saved_runs[:2], 3)
    kinds = {kind(row) for row in expected}
    assert {"special", "uncertain", "rest"} <= kinds
    for quantity, weigh in (("energy", lambda row: row["energy"]), ("tokens", lambda _: 1.0)):
        quantity_rows = plain_rows[plain_rows["quantity"] == quantity].set_index("kind")
        assert set(quantity_rows.index) == kinds
        for name in kinds:
            part = sum(weigh(row) for row in expected if kind(row) == name)
            share = part / sum(weigh(row) for row in expected)
            assert quantity_rows.loc[name, "value"] == pytest.approx(share, rel=1e-4)
            assert quantity_rows.loc[name, "low"] <= share * 1.0001
            assert quantity_rows.loc[name, "high"] >= share * 0.9999
    e = np.array([row["energy"] for row in expected])
    spread = plain_rows[plain_rows["quantity"] == "n_eff_share"]["value"].item()
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
    assert (
        ledger.classify_tokens(data, frozenset({1}), 1.0).tolist() == list(names) == [*ledger.KINDS]
    )


def test_special_tokens_are_those_of_the_tokenizer(saved_runs: list[Path]) -> None:
    data = token_table(saved_runs[:1], 0)
    special = load_run_vocabulary(saved_runs[0]).special
    assert special == frozenset(range(5))
    kinds = ledger.classify_tokens(data, special, np.inf)
    assert (kinds == "special").sum() == data["id"].isin(range(5)).sum() > 0
    assert not (ledger.classify_tokens(data, frozenset(), np.inf) == "special").any()


def test_lorenz_curves_take_the_largest_tokens_first(saved_runs: list[Path]) -> None:
    table = lorenz.collect(saved_runs)
    for quantity, size in (
        ("signal", lambda row: abs(row["cost"])),
        ("update", lambda row: row["energy"] ** 0.5),
    ):
        x = sorted((size(row) for row in expected_tokens(saved_runs[:2], 3)), reverse=True)
        curve = table[(table["method"] == "plain") & (table["step"] == 3)]
        curve = curve[curve["quantity"] == quantity]
        for share, value in zip(curve["tokens"], curve["value"], strict=True):
            count = share * len(x)
            num_whole = int(count)
            part = sum(x[:num_whole]) + (count - num_whole) * (
                x[num_whole] if num_whole < len(x) else 0
            )
            assert value == pytest.approx(part / sum(x), rel=2e-4, abs=1e-6)
        assert all(a <= b + 1e-9 for a, b in pairwise(curve["value"]))
        assert (curve["low"] <= curve["value"] + 1e-4).all()
        assert (curve["high"] >= curve["value"] - 1e-4).all()
        row = rows.read_rows(saved_runs[2] / "rows.jsonl")[0]
        single = table[(table["method"] == "other") & (table["step"] == 0)]
        single = single[(single["quantity"] == quantity) & (single["tokens"] == 0.01)]
        name = {"signal": "signal", "update": "energy"}[quantity]
        assert single["value"].item() == pytest.approx(
            row[f"signal/{name}_top1_share"], rel=0.05
        )  # the panel's histogram has levels 9 % wide


def test_equal_clusters_leave_no_interval() -> None:
    x = np.tile([4.0, 2.0, 1.0, 1.0], 6)
    value, low, high = lorenz.lorenz_curve(x, np.repeat(np.arange(6), 4), np.random.default_rng(0))
    assert np.allclose(low, value)
    assert np.allclose(high, value)
    top_quarter = lorenz.TOKEN_SHARES <= 0.25
    assert np.allclose(value[top_quarter], 2 * lorenz.TOKEN_SHARES[top_quarter]), (
        "a quarter of the tokens, half of it all"
    )
    assert value[-1] == 1


def test_heat_maps_pool_runs_by_their_tokens(saved_runs: list[Path]) -> None:
    table = heatmap.collect(saved_runs)
    expected = expected_tokens(saved_runs[:2], 3)
    plain_rows = table[(table["method"] == "plain") & (table["step"] == 3)]
    for first, last in ((0, 1), (2, 3), (16, 31)):
        bin_tokens = [row for row in expected if first <= row["position"] <= last]
        values = plain_rows[plain_rows["first"] == first].set_index("quantity")
        assert values.loc["cost", "last"] == last
        assert values.loc["cost", "tokens"] == values.loc["cut", "tokens"] == len(bin_tokens)
        assert values.loc["cost", "value"] == pytest.approx(
            np.mean([row["cost"] for row in bin_tokens]), rel=1e-4
        )
        assert values.loc["cost_95", "value"] == pytest.approx(
            np.quantile([row["cost"] for row in bin_tokens], 0.95), rel=1e-4
        )
        truncated = np.mean([not row["ended"] for row in bin_tokens])
        assert values.loc["cut", "value"] == pytest.approx(truncated, abs=1e-4)
    figure = heatmap.draw(table)
    maps = [axes.collections[0] for axes in figure.axes if axes.get_xlabel() or axes.collections]
    tiles = [np.ravel(x.get_array()) for x in maps if x.get_array() is not None]
    drawn_values = np.ma.concatenate(tiles).compressed()
    assert set(np.round(plain_rows["value"], 6)) <= set(np.round(drawn_values, 6))


def test_the_anatomy_adds_up_and_pools(saved_runs: list[Path]) -> None:
    table = anatomy.collect(saved_runs)
    totals = table[table["first"].isna() & (table["method"] == "plain") & (table["step"] == 3)]
    parts = totals.set_index("part")
    assert parts.loc["parts", "value"] == pytest.approx(
        parts.loc[[*anatomy.PARTS], "value"].sum(), rel=1e-3
    )
    for part in (*anatomy.PARTS, "parts"):
        values = [rows.read_rows(run / "rows.jsonl")[1] for run in saved_runs[:2]]
        n = np.array([row["divergence/tokens"] for row in values])
        x = np.array([row[f"divergence/kl_{part}"] for row in values])
        e = np.array([row[f"divergence/kl_{part}_se"] for row in values])
        assert parts.loc[part, "value"] == pytest.approx((n * x).sum() / n.sum(), rel=1e-4)
        assert parts.loc[part, "error"] == pytest.approx(
            np.sqrt((n**2 * e**2).sum()) / n.sum(), rel=1e-4
        )
    binned = table[(table["method"] == "plain") & (table["step"] == 3) & (table["first"] == 16)]
    assert binned["tokens"].iloc[0] == sum(
        16 <= row["position"] <= 31 for row in expected_tokens(saved_runs[:2], 3)
    )


def test_quadrants_hold_every_token_once(saved_runs: list[Path]) -> None:
    table = quadrants.collect(saved_runs)
    expected = expected_tokens(saved_runs[:2], 3)
    start = expected_tokens(saved_runs[:2], 0)
    x, y = (float(np.quantile([row[c] for row in start], 0.8)) for c in ("entropy", "kl"))
    plain_rows = table[(table["method"] == "plain") & (table["step"] == 3)]
    assert plain_rows[plain_rows["kind"] == "cell"]["tokens"].sum() == len(expected)
    energies = plain_rows[plain_rows["kind"] == "energy"].set_index("quadrant")
    for is_undecided, is_apart in ((a, b) for a in (False, True) for b in (False, True)):
        name = f"{'undecided' if is_undecided else 'decided'}, {'apart' if is_apart else 'near'}"
        quadrant_tokens = [
            r for r in expected if (r["entropy"] > x) == is_undecided and (r["kl"] > y) == is_apart
        ]
        share = sum(r["energy"] for r in quadrant_tokens) / sum(r["energy"] for r in expected)
        assert energies.loc[name, "share"] == pytest.approx(share, rel=1e-3, abs=1e-6)
    figure = quadrants.draw(table)
    share = energies.loc["undecided, apart", "share"]
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert any(f"{100 * share:.0f} % energy" in text for text in texts)
    counts = figure.axes[1].collections[0].get_array()
    assert np.nansum(np.ma.filled(counts, 0)) == len(expected)


def test_the_sampler_check_tells_a_nucleus(saved_runs: list[Path]) -> None:
    data, expected = token_table(saved_runs[:1], 3), expected_tokens(saved_runs[:1], 3)
    results = sampler.z_by_kind(data)
    for name, is_selected in (
        ("all", lambda row: True),
        ("student undecided", lambda row: row["entropy"] >= 0.1),
        ("first 8 tokens", lambda row: row["position"] < 8),
    ):
        selected = [row for row in expected if is_selected(row)]
        z = sum(row["surprise"] - row["entropy"] for row in selected)
        variance = sum(row["surprise_variance"] for row in selected)
        assert results[name] == pytest.approx((z / np.sqrt(variance), variance), rel=1e-6)
    assert abs(results["all"][0]) < 4
    likely = data.assign(student_logp=data["student_logp"].clip(lower=-1.0))
    assert sampler.z_by_kind(likely)["all"][0] < -4
    table = sampler.collect(saved_runs)
    first = rows.read_rows(saved_runs[0] / "rows.jsonl")[0]["consistency/z_H@4-7"]
    position = table[(table["panel"] == "position") & (table["label"] == "4–7")]
    assert any(value == pytest.approx(first, rel=1e-4) for value in position["value"])
    figure = sampler.draw(table[table["method"] == "plain"])
    values = position[position["method"] == "plain"]["value"]
    diamonds = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() == "D"]
    pooled = values.sum() / np.sqrt(len(values))
    assert any(len(y) and y[0] == pytest.approx(pooled) for y in diamonds)
    halves = [sampler.z_by_kind(data[data["response"] % 2 == i])["all"] for i in (0, 1)]
    z, variance = (np.array(x) for x in zip(*halves, strict=True))
    assert sampler.combine_z(z, variance) == pytest.approx(results["all"][0])


def test_ending_has_the_mean_that_it_estimates() -> None:
    """Averaged over all tokens with weights p, the estimate equals the exact probability."""
    v, k, end = 7, 3, 5
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(1, 6, v, generator=g).double().mul(2).log_softmax(-1) for _ in range(2))
    ids = q.topk(k, -1).indices
    in_support = (ids == end).any(-1)[0]
    assert in_support.any()
    assert not in_support.all()
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
                prefix=DistributionStats(**compute_distribution_stats(p, q, token)),
            )
            mean += p[0, :, y].exp() * tokenizer.eos_probability(batch, end, role)[0]
        assert torch.allclose(mean, w[0, :, end].exp(), rtol=1e-10)


def test_the_tokenizer_sheet_names_what_the_teacher_excludes(saved_runs: list[Path]) -> None:
    data = token_table(saved_runs[:2], 0)
    data["impossible"] = (data["cost"] > 2) & (data["id"] < 9)
    shares = tokenizer.excluded_shares(data, np.random.default_rng(0))
    size = data["cost"].abs().sum()
    for token, (value, low, high) in shares.items():
        token_rows = data[data["impossible"] & (data["id"] == token)]
        assert value == pytest.approx(token_rows["cost"].abs().sum() / size)
        assert low <= value <= high
    assert set(shares) == set(data[data["impossible"]]["id"])
    table = tokenizer.collect(saved_runs)
    assert set(tokenizer.HAZARDS) <= set(table["kind"])
    end = make_tokenizer().eos_token_id
    hazard = table[(table["kind"] == "student") & (table["first"] == 16) & (table["step"] == 0)]
    parts = []
    for dense_batch in (dense_batches(seed)[0] for seed in METHODS["plain"]):
        positions = [(i, t) for i, t in dense_batch.tokens() if 16 <= t <= 31]
        estimate = tokenizer.eos_probability(dense_batch.batch, end, "student")
        parts += [float(estimate[i, t]) for i, t in positions]
    if len(parts) >= tokenizer.MIN_TOKENS:
        value = hazard[hazard["method"] == "plain"]["value"].item()
        assert value == pytest.approx(np.mean(parts), rel=1e-3)


def test_names_of_ids_are_their_text() -> None:
    lab = make_tokenizer()
    parsed = tokenizer_vocabulary(lab.backend_tokenizer)
    for text in ("a", "7", "é", "é"[0]):
        ids = lab.encode(text)
        data = text.encode()
        names = [data[i : i + 1].decode("utf-8", "backslashreplace") for i in range(len(data))]
        assert [parsed.name(i) for i in ids] == names
    assert parsed.name(lab.encode(" ")[0]) == "␣"
    assert parsed.name(lab.encode("\n")[0]) == "⏎"
    assert parsed.name(lab.eos_token_id) == "<|im_end|>"
    assert parsed.name(10**6) == "#1000000"


def outcome_row(step: int, reward: float, truncated: float, entropy: float) -> dict:
    row = {"step": step, "response/reward": reward, "response/truncated_share": truncated}
    return row | {"divergence/student_entropy": entropy, "response/truncated_share_se": 0.01}


def test_a_collapse_is_told_from_outcomes_and_the_lead_from_it(tmp_path: Path) -> None:
    g, run_folders = np.random.default_rng(0), []
    for seed in range(4):
        run = tmp_path / f"{'good' if seed < 3 else 'bad'}-{seed}"
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"seed": seed}))
        for step in range(20):
            collapses = seed == 3
            row = outcome_row(
                step,
                0.2 if collapses and step >= 12 and step != 13 else 0.6,
                0.9 if collapses and step >= 15 else 0.05 + 0.01 * g.random(),
                1 + 0.1 * g.normal() + (5 if collapses and step >= 9 else 0),
            )
            rows.append_row(run / "rows.jsonl", row)
        run_folders.append(run)
    assert warning.collapse_step(rows.read_rows(run_folders[0] / "rows.jsonl")) is None
    assert (
        warning.collapse_step(rows.read_rows(run_folders[3] / "rows.jsonl")) == 14
    )  # step 12 alone is no collapse
    table = warning.collect(run_folders)
    assert set(table["kind"]) == {"healthy", "bad"}
    nearby = [row for run in run_folders[:3] for row in rows.read_rows(run / "rows.jsonl")]
    nearby = np.array([x["divergence/student_entropy"] for x in nearby if 5 <= x["step"] <= 9])
    entropy = table[table["indicator"] == "divergence/student_entropy"]
    bad_row = entropy[(entropy["run"] == "bad-3") & (entropy["step"] == 7)]
    z = (bad_row["value"].item() - nearby.mean()) / nearby.std(ddof=1)
    assert bad_row["z"].item() == pytest.approx(z, abs=0.01)
    healthy_rows = entropy[entropy["kind"] == "healthy"]
    assert len(healthy_rows) < 20 < len(entropy), (
        "of healthy runs what went off, and the first step"
    )
    assert set(healthy_rows["run"]) == {"good-0", "good-1", "good-2"}
    texts = [text.get_text() for text in warning.draw(table).axes[0].texts]
    assert "5 [1/1, 0/3]" in texts, "step 9 to 14, in one of one run, and in no healthy run"
    with pytest.raises(ValueError, match="3 of 3 runs are healthy"):
        warning.collect(run_folders[:3])


def test_the_control_is_paired_by_prompt(saved_runs: list[Path]) -> None:
    run = saved_runs[0]
    with pytest.raises(FileNotFoundError, match="opd probe-own-prefix"):
        fan.collect([run])
    all_batches = {
        "teacher": make_dense_batch(5),
        "student": make_dense_batch(6),
        "trained": make_dense_batch(7),
    }
    for name, dense_batch in all_batches.items():
        dense_batch.batch.save(run / "control" / f"{name}.safetensors")
    table = fan.collect([run])
    doubts = {}
    for name, dense_batch in all_batches.items():
        positions = [(i, t) for i, t in dense_batch.tokens() if 4 <= t <= 7]
        doubts[name] = np.mean([1 - float(dense_batch.q[i, t].exp().max()) for i, t in positions])
        bin_rows = table[(table["source"] == name) & (table["first"] == 4)].set_index("quantity")
        assert bin_rows.loc["doubt", "value"] == pytest.approx(doubts[name], rel=1e-4)
        assert bin_rows.loc["doubt", "tokens"] == len(positions)
        entropy = np.mean(
            [-float((dense_batch.q[i, t].exp() * dense_batch.q[i, t]).sum()) for i, t in positions]
        )
        assert bin_rows.loc["teacher_entropy", "value"] == pytest.approx(entropy, rel=1e-4)
    teacher_tokens = pd.DataFrame({"prompt": np.arange(9).repeat(3), "bin": 2, "doubt": 0.1})
    teacher_tokens["doubt"] += np.arange(9).repeat(3)  # prompts differ a lot, the gap hardly does
    student_tokens = teacher_tokens.assign(doubt=teacher_tokens["doubt"] + 0.5)
    (gap,) = fan.paired_gaps(teacher_tokens, student_tokens, np.random.default_rng(0))
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert (gap["first"], gap["last"], gap["tokens"]) == (4, 7, 27)
    longer = student_tokens.iloc[np.repeat(np.arange(27), np.arange(27) % 5 + 1)]
    (gap,) = fan.paired_gaps(teacher_tokens, longer, np.random.default_rng(0))
    assert gap["value"] == pytest.approx(
        longer["doubt"].mean() - teacher_tokens["doubt"].mean(), rel=1e-4
    )


def test_signal_and_loss_are_the_probes(tmp_path: Path) -> None:
    run = tmp_path / "probed-0"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"seed": 0}))
    for step, signal in enumerate((4.0, None, -0.5)):
        row = {"step": step, "divergence/reverse_kl": 0.5, "divergence/reverse_kl_se": 0.1}
        if signal is not None:
            row |= {"gradient/signal": signal}
            row |= {"gradient/signal_low": signal - 1, "gradient/signal_high": signal + 1}
        rows.append_row(run / "rows.jsonl", row)
    table = signal_loss.collect([run])
    assert table["step"].tolist() == [0, 2]
    assert table["ratio"].tolist() == [4.0, -0.5]
    figure = signal_loss.draw(table)
    floor = 4.0 / 3
    triangles = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert len(triangles) == 1, "the interval of the second reaches 0"
    assert figure.axes[0].lines[0].get_ydata().tolist() == [4.0, floor]
    (run / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="--probe-every"):
        signal_loss.collect([run])


def test_pairs_show_the_same_numbers(saved_runs: list[Path]) -> None:
    table = pairs.collect([saved_runs[2]])
    expected = expected_tokens([saved_runs[2]], 0)
    dots = table[table["panel"] == "scatter"]
    assert len(dots) == min(pairs.NUM_POINTS, len(expected))
    costs = sorted(np.log(dots["x"] / dots["y"]))
    assert np.allclose(costs, sorted(row["cost"] for row in expected), atol=0.02)
    bin_signal = [-row["cost"] for row in expected if 16 <= row["position"] <= 31]
    series = table[(table["panel"] == "gap") & np.isclose(table["x"], np.sqrt(17 * 32), rtol=1e-3)]
    series = series.set_index("series")
    assert series.loc["mean", "y"] == pytest.approx(np.mean(bin_signal), rel=1e-3)
    assert series.loc["quantiles", "y"] == pytest.approx(np.median(bin_signal), rel=1e-3)
    assert series.loc["quantiles", "low"] == pytest.approx(np.quantile(bin_signal, 0.05), rel=1e-3)
    figure = pairs.draw(table)
    assert sorted(figure.axes[0].lines[0].get_xdata()) == sorted(dots["x"])


def test_folders_that_cannot_be_read_say_why(saved_runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        group_by_method([tmp_path])
    empty = tmp_path / "empty-0"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"seed": 0, "student": "nowhere"}))
    with pytest.raises(FileNotFoundError, match="--save-batch-every"):
        common_saved_steps([saved_runs[0], empty])
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load_run_vocabulary(empty)
    assert list(group_by_method([*saved_runs, empty])) == ["plain", "other", "empty"]
