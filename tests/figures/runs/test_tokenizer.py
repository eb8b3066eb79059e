"""The tokenizer sheet: special tokens, names of ids, hazards of the end, excluded tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.batch import DistributionStats, ScoredRollouts, Support
from diagnostics.core.distribution_stats import compute_distribution_stats
from diagnostics.records.vocabulary import load_run_vocabulary, tokenizer_vocabulary
from figures.collect.tokens import token_table
from figures.runs import (
    ledger,
    tokenizer,
)
from opd.lab.build import make_tokenizer
from tests.helpers.records.saved_runs import METHODS, dense_batches


def test_special_tokens_are_those_of_the_tokenizer(saved_runs: list[Path]) -> None:
    data = token_table(saved_runs[:1], 0)
    special = load_run_vocabulary(saved_runs[0]).special
    assert special == frozenset(range(5))
    kinds = ledger.classify_tokens(data, special, np.inf)
    assert (kinds == "special").sum() == data["id"].isin(range(5)).sum() > 0
    assert not (ledger.classify_tokens(data, frozenset(), np.inf) == "special").any()


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
