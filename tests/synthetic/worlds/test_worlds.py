"""Test the construction of worlds, and the fields of a sampled batch."""

from dataclasses import replace

import pytest
import torch

from diagnostics.core.distribution_stats import compute_distribution_stats
from synthetic.exact import moments
from synthetic.sampling.trajectories import sample, with_support
from synthetic.worlds.mdp import TabularMDP, random_chain, random_pair, with_end_state
from tests.helpers import mdp_enumeration as by_hand
from tests.helpers.worlds import pair, seeded, token_tree, worlds


def test_every_prefix_of_a_tree_is_a_state_of_its_own() -> None:
    paths = by_hand.enumerate_paths(token_tree(3, 3))
    assert len(paths.tokens) == 27
    prefixes: dict[int, set[tuple[int, ...]]] = {}
    for states, tokens in zip(paths.states.tolist(), paths.tokens.tolist(), strict=True):
        for t, state in enumerate(states):
            prefixes.setdefault(state, set()).add(tuple(tokens[:t]))
    assert sorted(prefixes) == list(range(1 + 3 + 9))
    assert all(len(prefix_set) == 1 for prefix_set in prefixes.values())
    assert len(set.union(*prefixes.values())) == len(prefixes)


def test_mixing_scales_the_odds_of_leaving_a_block() -> None:
    full, slow, never = (random_chain(6, 2, 1, seeded(0), mixing=m) for m in (1.0, 0.1, 0.0))
    other_block = torch.arange(6)[:, None] // 3 != torch.arange(6) // 3

    def odds(mdp: TabularMDP) -> torch.Tensor:
        leave = (mdp.transition * other_block[:, None, :]).sum(-1)
        return leave / (1 - leave)

    torch.testing.assert_close(odds(slow), 0.1 * odds(full))
    assert odds(never).max() == 0 < odds(full).min()


def test_ending_stops_with_the_given_probability_and_keeps_the_moves() -> None:
    chain = worlds()["chain"]
    stop = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.0, 1.0]], dtype=torch.float64)
    world = with_end_state(chain, stop)
    torch.testing.assert_close(world.transition[:3, :, 3], stop)
    torch.testing.assert_close(world.transition[0, 1, :3], 0.8 * chain.transition[0, 1])


@pytest.mark.parametrize("heterogeneity", [0.0, 0.7])
def test_a_pair_is_as_far_apart_as_asked(heterogeneity: float) -> None:
    mdp = random_chain(100, 50, 1, seeded(1))
    student, teacher = random_pair(mdp, seeded(2), 0.3, heterogeneity, sharpness=2.0)
    distance = (teacher - student).square().mean(-1).sqrt()
    assert distance.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.05)
    assert student.square().mean().sqrt().item() == pytest.approx(2.0, rel=0.05)
    # the spread over states is that of exp(heterogeneity * noise), plus a little sampling noise
    assert distance.log().std().item() == pytest.approx(heterogeneity, abs=0.12)


@pytest.mark.parametrize("name", ["tokens", "ending"])
def test_a_sampled_batch_records_where_it_was(name: str) -> None:
    mdp = worlds()[name]
    student, teacher = pair(mdp)
    trajectories = sample(mdp, student, teacher, 20_000, seeded(3))
    batch = with_support(trajectories, student, teacher, "full").batch.validate()
    assert batch.prompt.equal(trajectories.states[:, 0])
    log_policies = [x.log_softmax(-1)[trajectories.states] for x in (student, teacher)]
    for part, expected in compute_distribution_stats(*log_policies, batch.tokens).items():
        torch.testing.assert_close(getattr(batch.prefix, part), expected * batch.mask)
    for actual, expected in zip(
        (batch.support.student_logp, batch.support.teacher_logp), log_policies, strict=True
    ):
        torch.testing.assert_close(actual, expected * batch.mask[..., None])
    assert batch.support.ids[~batch.mask].eq(0).all()
    assert batch.support.ids[batch.mask].eq(torch.arange(mdp.num_actions)).all()
    if mdp.end is None:
        assert bool(batch.ended.all())
        return
    assert bool(batch.ended[batch.lengths < mdp.horizon].all())
    occupancy = moments.sequence_kl(
        replace(mdp, horizon=mdp.horizon + 1), student, teacher
    ).occupancy
    share = occupancy[-1, mdp.end].item()
    error = (share * (1 - share) / len(batch)) ** 0.5
    assert abs(batch.ended.double().mean().item() - share) < 4 * error
