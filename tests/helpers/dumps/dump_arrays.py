"""Responses with both models' full distributions, from which dumps are written and checked.

Needs numpy only, so that other tools' environments can write the examples with it.
"""

from dataclasses import dataclass

import numpy as np

VOCABULARY = 40


@dataclass(frozen=True)
class Sampled:
    """A response to a prompt."""

    prompt: list[int]
    tokens: list[int]
    student: np.ndarray
    """(T, V) log-probabilities."""
    teacher: np.ndarray
    """(T, V) log-probabilities."""
    loss: list[int]
    """0 where the text of a tool, which the student did not sample, stands."""
    ended: bool
    reward: float
    prompt_student: np.ndarray
    """(P, V) log-probabilities of the prompt's tokens; row 0 is meaningless."""

    @property
    def student_logp(self) -> list[float]:
        return self.student[np.arange(len(self.tokens)), self.tokens].tolist()

    @property
    def teacher_logp(self) -> list[float]:
        return self.teacher[np.arange(len(self.tokens)), self.tokens].tolist()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sampled_responses(tools: bool = True) -> list[Sampled]:
    """Return six responses to three prompts; with tools every third has text of a tool."""
    generator = np.random.default_rng(7)
    responses = []
    prompts = [generator.integers(1, VOCABULARY, size=2 + i).tolist() for i in range(3)]
    for i in range(6):
        prompt, size = prompts[i // 2], 4 + i
        student = log_softmax(1.5 * generator.normal(size=(size, VOCABULARY)))
        teacher = log_softmax(student + 0.8 * generator.normal(size=student.shape))
        tokens = [int(generator.choice(VOCABULARY, p=np.exp(p))) for p in student]
        loss = [1] * size
        if tools and i % 3 == 0:
            loss[1:3] = [0, 0]
        prompt_student = log_softmax(generator.normal(size=(len(prompt), VOCABULARY)))
        responses.append(
            Sampled(
                prompt, tokens, student, teacher, loss, i % 2 == 0, float(i % 2), prompt_student
            )
        )
    return responses


def mean_cost(responses: list[Sampled]) -> float:
    """Return the mean of log student - log teacher over the tokens of the loss."""
    costs = [
        a - b
        for r in responses
        for a, b, used in zip(r.student_logp, r.teacher_logp, r.loss, strict=True)
        if used
    ]
    return sum(costs) / len(costs)


def outside_share(responses: list[Sampled], k: int, role: str) -> float:
    """Return the share of tokens outside the K most probable of a model; no mask."""
    is_outside = []
    for r in responses:
        logp = r.teacher if role == "teacher" else r.student
        top = np.argsort(-logp, axis=1)[:, :k]
        is_outside += [token not in ids for token, ids in zip(r.tokens, top, strict=True)]
    return float(np.mean(is_outside))
