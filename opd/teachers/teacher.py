"""Teachers: what a run asks of one, wherever its weights are.

`opd.teachers.factory` makes the teacher that the settings name, once; everything else asks the
teacher. One in this process (`LocalTeacher`, `AdapterFreeTeacher`, `EmaTeacher`) is scored from its
hidden states; one on a server (`ServerTeacher`) is queried.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.chat_template import ChatFormat
from opd.data.prompts import Prompts
from opd.models.lora import without_adapters
from opd.models.model import CausalLM, context_length, split_head
from opd.serving.addresses import is_url
from opd.teachers.client import TeacherClient
from opd.teachers.remote_scores import TeacherScores, score_remote
from opd.teachers.score_cache.cache import ScoreCache
from opd.teachers.score_cache.identity import verify_text

CACHE_PREFIX = "cache:"
"""Beginning of the name of a teacher whose scores are in a folder."""
NO_TEACHER = "none"
"""Name of the teacher of a run without one."""


class Capability(Enum):
    """What a teacher can provide; the value is its description in messages."""

    HIDDEN_STATES = "its hidden states"
    DISTRIBUTIONS = "its full distribution"
    TOP_K = "its own most probable ids"
    CHOSEN_IDS = "its log-probabilities of other ids"


class Teacher(Protocol):
    """A teacher of a run; the methods that a kind of teacher does not define do nothing."""

    possible_capabilities: ClassVar[frozenset[Capability]] = frozenset(Capability)
    """What a teacher of this kind may provide, known before it is loaded or connected."""
    is_separate: ClassVar[bool] = False
    """Whether its weights are loaded from a model of its own, apart from the student's."""
    follows_student: ClassVar[bool] = False
    """Whether `update` changes it after every optimizer step."""
    dtype: ClassVar[str | None] = None
    """Precision of its weights; None for the configured one."""
    is_recorded: ClassVar[bool] = False
    """Whether it only knows scores of given prompts and responses."""

    place: ClassVar[str] = "a model in this process"
    """What this kind of teacher is, for messages."""

    name: str
    """Folder, hub name or address, or "base" or "ema"."""
    temperature: float = 1.0
    """Temperature of its scores, if it has no DISTRIBUTIONS."""
    model: CausalLM
    """The model; a teacher without HIDDEN_STATES raises an error instead."""
    eos: tuple[int, ...] | None = None
    """Ids that end its responses, its tokenizer's own first; None if they are the student's."""
    is_quantised: bool = False
    """Whether its layers have fewer bits than its files."""
    chat_format: ChatFormat | None = None
    """Chat template of its own tokenizer; None if that is the student's or is not known."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it provides, known once it is loaded or connected."""
        return self.possible_capabilities

    def top_k(
        self, prompts: Prompts, rollouts: Rollouts, k: int, chosen_ids: Tensor | None = None
    ) -> TeacherScores:
        """Query its K most probable ids at every sampled token, if it has no HIDDEN_STATES.

        Args:
            prompts: B prompts.
            rollouts: B responses.
            k: Number of ids per position.
            chosen_ids: (N, C) further ids to score, -1 where there is none; None for none. Needs
                CHOSEN_IDS.

        Returns:
            The scores, at temperature 1.

        Raises:
            InvalidInput: The teacher is scored from its hidden states instead.
        """
        raise InvalidInput(f"the teacher {self.name} runs in this process; use its hidden states")

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Keep its weights on the device inside the block.

        Args:
            device: Device on which the teacher scores.

        Yields:
            Nothing.
        """
        yield

    @contextmanager
    def generating(self) -> Iterator[CausalLM]:
        """Give its model to be sampled from inside the block.

        Yields:
            The model.
        """
        yield self.model

    def update(self, student: CausalLM) -> None:
        """Follow the student after an optimizer step."""
        return

    def frozen_weights(self) -> list[Tensor]:
        """Return the weights that training must not change."""
        return []

    def with_student(self, student: CausalLM) -> "Teacher":
        """Return the teacher of the same student in another place, such as sharded."""
        return self

    def check_length(self, max_length: int) -> None:
        """Check that it supports prompts and responses of together `max_length` tokens."""
        return

    def max_length(self) -> int | None:
        """Return the most tokens of a prompt with its response; None if it is not known."""
        return context_length(self.model.network)

    def resync(self, student: CausalLM) -> None:
        """Take over the student's weights, if it follows the student."""
        return

    def verify_fingerprint(self, path: Path) -> None:
        """Check, with a file of the run folder, that it still is the model of the run's start."""
        return

    def save(self, folder: Path) -> None:
        """Write the state that training changes to the folder of a checkpoint."""
        return

    def load(self, folder: Path) -> None:
        """Read the state that `save` wrote."""
        return


@dataclass(eq=False)
class LocalTeacher(Teacher):
    """A frozen model of its own in this process."""

    name: str
    model: CausalLM
    eos: tuple[int, ...] | None = None
    is_quantised: bool = False
    offload: bool = False
    """Whether the weights are in host memory while the teacher does not score."""
    chat_format: ChatFormat | None = None
    is_separate: ClassVar[bool] = True

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Keep its weights on the device inside the block and, if offloaded, on the host outside.

        Args:
            device: Device on which the teacher scores.

        Yields:
            Nothing.
        """
        if not self.offload:
            yield
            return
        self.model.network.to(device)
        try:
            yield
        finally:
            self.model.network.to("cpu")

    def frozen_weights(self) -> list[Tensor]:
        """Return all weights."""
        return list(self.model.network.parameters())


@dataclass(eq=False)
class AdapterFreeTeacher(Teacher):
    """The student without its LoRA adapters; it needs no memory."""

    model: CausalLM
    """The student's network with its adapters off."""
    name: str = "base"

    @contextmanager
    def generating(self) -> Iterator[CausalLM]:
        """Keep the adapters off inside the block.

        Yields:
            The model.
        """
        with self.model.network.disable_adapter():
            yield self.model

    def frozen_weights(self) -> list[Tensor]:
        """Return the student's base weights; the adapters are trained."""
        return [weight for weight in self.model.network.parameters() if not weight.requires_grad]

    def with_student(self, student: CausalLM) -> "AdapterFreeTeacher":
        """Return the teacher of a student in another place."""
        return replace(self, model=without_adapters(student))


@dataclass(eq=False)
class EmaTeacher(LocalTeacher):
    """An exponential moving average of the student, in float32."""

    decay: float = 0.99
    """Weight of the average in every update."""
    is_separate: ClassVar[bool] = False
    follows_student: ClassVar[bool] = True
    dtype: ClassVar[str | None] = "float32"

    @torch.no_grad()
    def update(self, student: CausalLM) -> None:
        """Set teacher <- decay * teacher + (1 - decay) * student, for every weight."""
        weight_pairs = zip(
            self.model.network.parameters(), student.network.parameters(), strict=True
        )
        for teacher_weight, student_weight in weight_pairs:
            teacher_weight.lerp_(student_weight.to(teacher_weight), 1 - self.decay)

    @torch.no_grad()
    def resync(self, student: CausalLM) -> None:
        """Set teacher <- student, for every weight."""
        weight_pairs = zip(
            self.model.network.parameters(), student.network.parameters(), strict=True
        )
        for teacher_weight, student_weight in weight_pairs:
            teacher_weight.copy_(student_weight)

    def frozen_weights(self) -> list[Tensor]:
        """Return nothing: every update changes the average."""
        return []

    def save(self, folder: Path) -> None:
        """Write the average to the folder of a checkpoint."""
        save_model(self.model.network, str(folder / "teacher.safetensors"))

    def load(self, folder: Path) -> None:
        """Read the average that `save` wrote."""
        load_model(self.model.network, folder / "teacher.safetensors")


@dataclass(eq=False)
class ServerTeacher(Teacher):
    """A teacher on a server, which knows its own K most probable ids and the sampled one.

    Some servers also score ids that the student chose; whether one does is found out when it is
    connected (`opd.teachers.connection`).
    """

    name: str
    client: TeacherClient
    place: ClassVar[str] = "a server"
    eos: tuple[int, ...] | None = None
    possible_capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.TOP_K, Capability.CHOSEN_IDS}
    )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the server provides."""
        if self.client.chosen_route is not None:
            return self.possible_capabilities
        return self.possible_capabilities - {Capability.CHOSEN_IDS}

    @property
    def model(self) -> CausalLM:  # type: ignore[override]
        """Raise an error: the weights are elsewhere."""
        raise InvalidInput(
            f"the teacher {self.name} is a server, which provides neither hidden states nor full "
            "distributions; use a teacher in this process"
        )

    def top_k(
        self, prompts: Prompts, rollouts: Rollouts, k: int, chosen_ids: Tensor | None = None
    ) -> TeacherScores:
        """Query the server (`opd.teachers.remote_scores.score_remote`)."""
        return score_remote(self.client, prompts, rollouts, k, chosen_ids)

    def check_length(self, max_length: int) -> None:
        """Check that the server supports a sequence length (`TeacherClient.check_length`)."""
        self.client.check_length(max_length)

    def max_length(self) -> int | None:
        """Return the server's limit without the token that it generates; None if not known."""
        return None if self.client.limit is None else self.client.limit - 1

    def verify_fingerprint(self, path: Path) -> None:
        """Store a fingerprint of the server's model in a file, or compare it with the stored one.

        Args:
            path: File with the fingerprints of the run's servers.
        """
        self.client.verify_fingerprint(path)


@dataclass(eq=False)
class CachedTeacher(Teacher):
    """A teacher whose scores of given responses are on disk."""

    name: str
    cache: ScoreCache
    place: ClassVar[str] = "a cache of scores"
    is_recorded: ClassVar[bool] = True
    possible_capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.TOP_K, Capability.CHOSEN_IDS}
    )

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the cache holds; the only ids that it may hold besides its top-K are EOS ids."""
        if self.cache.header.mapped_eos is None:
            return frozenset({Capability.TOP_K})
        return self.possible_capabilities

    @property
    def eos(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Ids that end its responses."""
        return self.cache.header.teacher_eos

    @property
    def temperature(self) -> float:  # type: ignore[override]
        """Temperature of its scores."""
        return self.cache.header.temperature

    @property
    def model(self) -> CausalLM:  # type: ignore[override]
        """Raise an error: the model is not in memory."""
        raise InvalidInput(
            f"the teacher {self.name} is a cache of scores, which has neither hidden states nor "
            "full distributions; use a teacher in this process"
        )

    def top_k(
        self, prompts: Prompts, rollouts: Rollouts, k: int, chosen_ids: Tensor | None = None
    ) -> TeacherScores:
        """Look up the scores (`opd.teachers.score_cache.cache.ScoreCache.lookup`)."""
        if chosen_ids is not None and chosen_ids.shape[1] != 1:
            raise InvalidInput(
                f"the teacher {self.name} is a cache of the teacher's own most probable ids; it "
                "has no scores of the student's"
            )
        return self.cache.lookup(prompts, rollouts, k)

    def max_length(self) -> int | None:
        """Return None: what is in the cache was short enough."""
        return None

    def verify_fingerprint(self, path: Path) -> None:
        """Store the fingerprint of the teacher's weights in a file, or compare it.

        Args:
            path: File with the fingerprints of the run's teachers.

        Raises:
            InvalidInput: The run began with the scores of another teacher.
        """
        verify_text(path, self.name, self.cache.header.teacher_fingerprint)


@dataclass(eq=False)
class NoTeacher(Teacher):
    """The absence of a teacher, for an objective that reads none; nothing is in memory."""

    name: str = NO_TEACHER
    possible_capabilities: ClassVar[frozenset[Capability]] = frozenset()

    @property
    def model(self) -> CausalLM:  # type: ignore[override]
        """Raise an error: there is no model."""
        raise InvalidInput("teacher is none: the run has no teacher to read; set one")

    def max_length(self) -> int | None:
        """Return None: there is no limit."""
        return None


def teacher_type(name: str) -> type[Teacher]:
    """Return the kind of the teacher that a setting names, without loading or connecting it."""
    if is_url(name):
        return ServerTeacher
    if name.startswith(CACHE_PREFIX):
        return CachedTeacher
    derived: dict[str, type[Teacher]] = {
        "base": AdapterFreeTeacher,
        "ema": EmaTeacher,
        NO_TEACHER: NoTeacher,
    }
    return derived.get(name, LocalTeacher)


def make_ema_teacher(student: CausalLM, decay: float, offload: bool = False) -> EmaTeacher:
    """Return an average that starts as a float32 copy of the student."""
    network = copy.deepcopy(student.network).float().requires_grad_(False)
    model = split_head(network, student.vocabulary)
    return EmaTeacher("ema", model, decay=decay, offload=offload)
