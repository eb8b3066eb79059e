"""Small worlds in which every response can be enumerated, and the batches that a loss sees.

A world is a tree of prefixes. The student and the teacher are tables of logits, one row a prefix,
so that the gradient of anything by the student's table is exact.

Shapes: N prefixes, R responses of the world, B rows of a batch, T positions, V vocabulary, K ids.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

GARBAGE = 3.0
"""Standard deviation of the finite garbage behind the end of a response."""


@dataclass(frozen=True, eq=False, kw_only=True)
class World:
    """Prompts, all responses to them, two models, and a reward."""

    name: str
    """What is special about the world, for evidence."""
    tokens: Tensor
    """(R, T) ids, 0 behind the end."""
    lengths: Tensor
    """(R,) number of tokens, the EOS included."""
    nodes: Tensor
    """(R, T) row of the tables at each position, 0 behind the end."""
    prompt: Tensor
    """(R,) prompt of each response, from 0."""
    student: Tensor
    """(N, V) logits."""
    teacher: Tensor
    """(N, V) logits."""
    reward: Tensor
    """(R,) reward of each response."""
    k: int
    """K of the supports."""

    @cached_property
    def mask(self) -> Tensor:
        """(R, T) bool, the tokens of each response."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return int(self.prompt.max()) + 1

    def token_logp(self, table: Tensor) -> Tensor:
        """Return (..., R, T) log-probabilities of the tokens under tables, 0 behind the end.

        Args:
            table: (..., N, V) logits; gradients flow through.

        Returns:
            (..., R, T) log-probabilities.
        """
        logp = table.log_softmax(-1)[..., self.nodes, self.tokens]
        return torch.where(self.mask, logp, logp.new_zeros(()))

    def probabilities(self, table: Tensor) -> Tensor:
        """Return (..., R) the probability of each response; prompts are equally likely.

        Args:
            table: (..., N, V) logits.

        Returns:
            (..., R) probabilities, 1 in total.
        """
        return self.token_logp(table).sum(-1).exp() / self.num_prompts

    def visits(self, probabilities: Tensor) -> Tensor:
        """Return (..., N) how often each prefix is visited.

        Args:
            probabilities: (..., R) probability of each response.

        Returns:
            (..., N) expected number of visits.
        """
        weights = (probabilities[..., None] * self.mask).flatten(-2)
        visits = weights.new_zeros(*weights.shape[:-1], len(self.student))
        return visits.index_add_(-1, self.nodes.flatten(), weights)


def make_world(
    name: str,
    *,
    vocabulary: int,
    length: int,
    random_lengths: bool,
    seed: int,
    num_prompts: int = 2,
    sharpness: float = 1.0,
    distance: float = 1.0,
    k: int = 2,
) -> World:
    """Make a world with random logits.

    Args:
        name: What is special about it.
        vocabulary: V; the last id is the EOS where lengths are random.
        length: Longest response.
        random_lengths: Whether the EOS ends a response; otherwise all have the same length.
        seed: Seed of logits and rewards.
        num_prompts: Number of prompts.
        sharpness: Standard deviation of the student's logits.
        distance: Standard deviation of the teacher's distance from them.
        k: K of the supports.

    Returns:
        The world.
    """
    end = vocabulary - 1 if random_lengths else None
    responses = list(_responses(vocabulary, length, end))
    node_ids: dict[tuple[int, ...], int] = {}
    tokens, nodes, prompts = [], [], []
    for prompt, response in itertools.product(range(num_prompts), responses):
        prefixes = [(prompt, *response[:t]) for t in range(len(response))]
        ids = [node_ids.setdefault(prefix, len(node_ids)) for prefix in prefixes]
        padding = [0] * (length - len(response))
        tokens.append([*response, *padding])
        nodes.append([*ids, *padding])
        prompts.append(prompt)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(node_ids), vocabulary)
    student = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    offset = distance * torch.randn(shape, generator=generator, dtype=torch.float64)
    return World(
        name=name,
        tokens=torch.tensor(tokens),
        lengths=torch.tensor([len(x) for x in responses]).repeat(num_prompts),
        nodes=torch.tensor(nodes),
        prompt=torch.tensor(prompts),
        student=student,
        teacher=student + offset,
        reward=torch.randn(len(tokens), generator=generator, dtype=torch.float64),
        k=k,
    )


def _responses(vocabulary: int, length: int, end: int | None) -> list[tuple[int, ...]]:
    """Return all responses of at most `length` tokens, in the order of the tree."""
    complete: list[tuple[int, ...]] = []
    prefixes: list[tuple[int, ...]] = [()]
    for _ in range(length):
        longer = [(*prefix, token) for prefix in prefixes for token in range(vocabulary)]
        complete += [x for x in longer if x[-1] == end or len(x) == length]
        prefixes = [x for x in longer if x[-1] != end and len(x) < length]
    return complete


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows as a loss sees them, padded on the right with finite garbage."""

    arguments: dict[str, Any]
    """The arguments of a loss without gradient, by name (`opd.objectives.user_loss.PARAMETERS`)."""
    student_logits: Tensor
    """(B, T, V) logits, detached."""
    nodes: Tensor
    """(B, T) row of the tables at each position, 0 outside the mask."""
    rolls: Mapping[str, int] = field(default_factory=dict)
    """Arguments that the loss sees moved along the positions -> columns to the right."""

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, the supervised tokens, before any argument is moved."""
        mask: Tensor = self.arguments["mask"]
        return mask

    def select(self, rows: Tensor) -> "Batch":
        """Return the batch of some of the rows."""
        arguments = {
            name: value[rows] if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return Batch(
            arguments=arguments,
            student_logits=self.student_logits[rows],
            nodes=self.nodes[rows],
            rolls=self.rolls,
        )


def make_batch(
    world: World,
    rows: Tensor,
    *,
    prompt: Tensor | None = None,
    teacher: Tensor | None = None,
    sampler: Tensor | None = None,
    reward: Tensor | None = None,
    right: int = 1,
    left: int = 0,
    empty_rows: int = 0,
    seed: int = 0,
) -> Batch:
    """Lay out responses of a world as a batch.

    Args:
        world: The world.
        rows: (B,) responses, as indices into the world.
        prompt: (B,) ids of the prompts; those of the world if None.
        teacher: (N, V) logits; the world's if None.
        sampler: (N, V) logits of the sampler, which may be -inf; the world's student's if None.
        reward: (B,) rewards; the world's if None.
        right: Masked columns behind the longest response.
        left: Masked columns before the first token.
        empty_rows: Rows without any supervised token, of a prompt of their own, added at the end.
        seed: Seed of the garbage outside the mask.

    Returns:
        The batch.
    """
    teacher = world.teacher if teacher is None else teacher
    own_sampler = world.student if sampler is None else sampler
    num_rows, length, vocabulary = len(rows), world.tokens.shape[1], world.student.shape[1]
    shape = (num_rows + empty_rows, left + length + right)
    random_ids, student_noise, teacher_noise, sampler_noise = _garbage(shape, vocabulary, seed)
    supervised = world.mask[rows]

    def place(values: Tensor, background: Tensor) -> Tensor:
        """Write (B, length, ...) values of the mask over the garbage."""
        placed = background.to(values.dtype, copy=True)
        inside = placed[:num_rows, left : left + length]
        inside_mask = supervised.view(*supervised.shape, *[1] * (values.dim() - 2))
        inside.copy_(torch.where(inside_mask, values, inside))
        return placed

    nodes = world.nodes[rows]
    mask = place(supervised, torch.zeros(shape, dtype=torch.bool))
    tokens = place(world.tokens[rows], random_ids)
    student_logits = place(world.student[nodes], student_noise)
    teacher_logits = place(teacher[nodes], teacher_noise)
    sampler_logp = own_sampler[nodes].log_softmax(-1)
    sampler_logp = sampler_logp.gather(-1, world.tokens[rows][..., None])[..., 0]
    prompt = world.prompt[rows] if prompt is None else prompt
    reward = world.reward[rows] if reward is None else reward
    arguments = {
        "tokens": tokens,
        "mask": mask,
        "teacher_logits": teacher_logits,
        "sampler_logp": place(sampler_logp, -sampler_noise.abs()),
        "reward": torch.cat([reward, reward.new_zeros(empty_rows)]),
        "prompt": torch.cat([prompt, prompt.max().add(1).expand(empty_rows)]),
        "k": world.k,
    }
    return Batch(
        arguments=arguments,
        student_logits=student_logits,
        nodes=place(nodes, torch.zeros(shape, dtype=torch.long)),
    )


def _garbage(shape: tuple[int, int], vocabulary: int, seed: int) -> tuple[Tensor, ...]:
    """Return what lies outside the mask.

    Args:
        shape: (B, T) of the batch.
        vocabulary: V.
        seed: Seed.

    Returns:
        (B, T) ids, (B, T, V) logits of the student and of the teacher, and (B, T) numbers for the
        sampler.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, shape, generator=generator)
    noise = (
        GARBAGE * torch.randn(*shape, *last, generator=generator, dtype=torch.float64)
        for last in ((vocabulary,), (vocabulary,), ())
    )
    return ids, *noise
