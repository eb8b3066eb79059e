"""Keys of a cache, and which of several scorings of a row is read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from diagnostics.ragged import left_pad, right_pad
from opd.data.prompts import Prompts
from opd.lab.build import make_tokenizer
from opd.teachers.remote_scores import TeacherScores
from opd.teachers.score_cache.cache import ScoreCache, open_cache
from opd.teachers.score_cache.files import CacheHeader, CacheIndex, Shard, write_index
from opd.teachers.score_cache.identity import tokenizer_fingerprint, weights_fingerprint
from opd.teachers.score_cache.keys import batch_key, row_keys

PROMPTS = [[5, 6, 7], [8], [5, 6]]
RESPONSES = [[1, 2], [3, 4, 9, 9], [7, 1]]


def batch_of(rows: list[int], *, extra: int = 0) -> tuple[Prompts, Rollouts]:
    """Rows of the lists above, with `extra` more positions of padding on either side."""
    prompts = [PROMPTS[i] for i in rows]
    responses = [RESPONSES[i] for i in rows]
    tokens = torch.nn.functional.pad(right_pad(responses, torch.long), (0, extra))
    mask = torch.nn.functional.pad(
        right_pad([[True] * len(x) for x in responses], torch.bool), (0, extra)
    )
    in_prompt = left_pad([[True] * len(x) for x in prompts], torch.bool)
    index = torch.arange(len(rows))
    return (
        Prompts(
            tokens=torch.nn.functional.pad(left_pad(prompts, torch.long), (extra, 0)),
            mask=torch.nn.functional.pad(in_prompt, (extra, 0)),
            index=index,
            answers=[""] * len(rows),
        ),
        Rollouts(
            tokens=tokens,
            mask=mask,
            sampler_logp=torch.zeros(tokens.shape),
            prompt=index,
            ended=index > -1,
        ),
    )


def test_a_key_is_of_ids_and_not_of_padding() -> None:
    keys = row_keys(*batch_of([0, 1, 2]))
    assert len(set(keys)) == 3
    assert row_keys(*batch_of([2, 0, 1], extra=3)) == [keys[2], keys[0], keys[1]]
    prompts, rollouts = batch_of([0, 1, 2])
    changed_tokens = rollouts.tokens.clone()
    changed_tokens[0, 1] = 3
    changed_prompt = prompts.tokens.clone()
    changed_prompt[0, 2] = 3
    shorter = rollouts.mask.clone()
    shorter[0, 0] = False  # the first token is read and not scored
    others = [
        row_keys(prompts, replace(rollouts, tokens=changed_tokens))[0],
        row_keys(replace(prompts, tokens=changed_prompt), rollouts)[0],
        row_keys(prompts, replace(rollouts, mask=shorter))[0],
    ]
    assert len({keys[0], *others}) == 4
    # ids and flags that are the same numbers in a row, split elsewhere
    first, second = ([[5]], [[1, 1]]), ([[5, 1, 1]], [[1]])
    split_keys = []
    for prompt_ids, response_ids in (first, second):
        tokens = torch.tensor(response_ids)
        rollouts = replace(
            batch_of([1])[1],
            tokens=tokens,
            mask=tokens > 0,
            sampler_logp=torch.zeros(tokens.shape),
        )
        one_prompt = Prompts.from_ids(prompt_ids, torch.tensor([0]), [""])
        split_keys += row_keys(one_prompt, rollouts)
    assert split_keys[0] != split_keys[1]
    assert batch_key(keys) != batch_key(keys[::-1])


def write_cache(folder: Path, batches: list[tuple[list[int], float]]) -> ScoreCache:
    """Write batches of rows, with a value from which all of their scores are made."""
    shard = Shard()
    for rows, value in batches:
        prompts, rollouts = batch_of(rows)
        n = int(rollouts.sampled.sum())
        order = torch.arange(n)
        scores = TeacherScores(
            torch.stack([order, order + 1], 1),
            -value - order[:, None].expand(n, 2),
            -value - order / 8,
        )
        keys = row_keys(prompts, rollouts)
        shard.add(keys, batch_key(keys), rollouts.sampled.sum(1).tolist(), scores)
    folder.mkdir()
    tokenizer = make_tokenizer()
    header = CacheHeader(
        teacher="t",
        teacher_fingerprint="f",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary=12,
        temperature=1.0,
        support_k=2,
        teacher_eos=None,
        mapped_eos=None,
    )
    entry = shard.save(folder / "scores.safetensors")
    write_index(
        folder,
        CacheIndex(header=header, num_steps=2, num_done=2, shards={"scores.safetensors": entry}),
    )
    return open_cache(folder, tokenizer, 12)


def sampled_scores(cache: ScoreCache, rows: list[int], k: int = 2) -> Tensor:
    return cache.lookup(*batch_of(rows), k).sampled


def test_of_several_scorings_that_of_the_same_batch_is_read(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", [([0, 1, 2], 100.0), ([2, 0], 200.0), ([1, 0], 300.0)])
    order = torch.arange(8) / 8
    assert torch.equal(sampled_scores(cache, [0, 1, 2]), -100 - order)
    assert torch.equal(sampled_scores(cache, [2, 0]), -200 - order[:4])
    assert torch.equal(sampled_scores(cache, [1, 0]), -300 - order[:6])
    # a batch that was never scored: the first scoring of each row, in the order of the rows
    first = -100 - order
    assert torch.equal(sampled_scores(cache, [1, 2]), first[2:])
    assert torch.equal(sampled_scores(cache, [2, 1]), torch.cat([first[6:], first[2:6]]))
    scores = cache.lookup(*batch_of([2]), 1)
    assert scores.ids.tolist() == [[6], [7]]
    assert scores.logp.tolist() == [[-106.0], [-107.0]]
    assert cache.num_absent(*batch_of([0, 2])) == 0
    PROMPTS[1][0] = 3
    try:
        assert cache.num_absent(*batch_of([0, 1])) == 1
        with pytest.raises(InvalidInput, match=r"1 of 2 responses of a batch are not .* row 1"):
            sampled_scores(cache, [0, 1])
    finally:
        PROMPTS[1][0] = 8
    with pytest.raises(InvalidInput, match="support_k is 3, but the cache"):
        sampled_scores(cache, [0], 3)


def test_a_fingerprint_changes_with_the_weights() -> None:
    first, second = torch.nn.Linear(3, 400), torch.nn.Linear(3, 400)
    second.load_state_dict(first.state_dict())
    assert weights_fingerprint(first) == weights_fingerprint(second)
    with torch.no_grad():
        second.bias[-1] += 1e-3
    assert weights_fingerprint(first) != weights_fingerprint(second)
    assert weights_fingerprint(first) != weights_fingerprint(first.double())
