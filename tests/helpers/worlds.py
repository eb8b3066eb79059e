"""Small worlds, policies and seeded generators for tests of the exact engine."""

from dataclasses import replace

import torch
from torch import Tensor

from synthetic.worlds.mdp import (
    TabularMDP,
    random_chain,
    random_pair,
    token_chain,
    with_end_state,
)

GAMMAS = (0.0, 0.5, 1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def worlds() -> dict[str, TabularMDP]:
    """Return worlds small enough to enumerate; the last has random lengths and a rare start."""
    chain = random_chain(3, 2, 4, seeded(0), mixing=0.3)
    stop = 0.4 * torch.rand(3, 2, generator=seeded(1), dtype=torch.float64)
    rare = replace(chain, start=torch.tensor([0.9, 0.0999, 0.0001], dtype=torch.float64))
    return {
        "chain": chain,
        "tokens": token_chain(3, 4),
        "tree": token_tree(2, 4),
        "ending": with_end_state(rare, stop),
    }


def token_tree(num_actions: int, depth: int) -> TabularMDP:
    """Return the world in which every prefix of up to depth - 1 tokens is a state of its own.

    Args:
        num_actions: Number of actions A.
        depth: Number of tokens of a response.

    Returns:
        The world, its states numbered level by level.
    """
    num_states = sum(num_actions**d for d in range(depth))
    children = num_actions * torch.arange(num_states)[:, None] + torch.arange(num_actions) + 1
    # the leaves' successors are never visited; any valid state index works
    children = torch.where(children < num_states, children, 0)
    transition = torch.nn.functional.one_hot(children, num_states).to(torch.float64)
    start = torch.nn.functional.one_hot(torch.tensor(0), num_states).to(torch.float64)
    return TabularMDP(transition, start, depth)


def pair(mdp: TabularMDP, seed: int = 2) -> tuple[Tensor, Tensor]:
    return random_pair(mdp, seeded(seed), distance=1.0, heterogeneity=0.5)
