"""Files of a cache: cache.json, and shards of scores as safetensors.

cache.json says whose scores they are and how they were computed, and lists the shards with sizes
and checksums. It is written after each shard, so that a cache that is being made can be continued.

Shapes: R rows of a shard, N their tokens, K ids per token.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.atomic import atomic_write, write_text
from diagnostics.io.files import parse_json, read_text
from opd.runtime.manifest import checksum, entry_problem
from opd.teachers.remote_scores import TeacherScores

FORMAT = "opdlab-teacher-cache-1"
CACHE_FILE = "cache.json"
SHARD_BYTES = 1 << 26
"""Bytes of scores after which a shard is written."""


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """Whose scores a cache holds, and how they were computed."""

    teacher: str
    """Name of the teacher, for messages."""
    teacher_fingerprint: str
    """Hash of its weights (`opd.teachers.score_cache.identity`)."""
    tokenizer_fingerprint: str
    """Hash of the vocabulary of the student's tokenizer, which encoded prompts and responses."""
    vocabulary: int
    """Number of ids over which the teacher's softmax was taken."""
    temperature: float
    """Temperature of the scores."""
    support_k: int
    """K, the teacher's most probable ids of each token."""
    teacher_eos: tuple[int, ...] | None
    """EOS ids of the teacher; None if not known."""
    mapped_eos: tuple[int, ...] | None
    """EOS ids of the student that were mapped to the teacher's (`map_eos`); None if none were."""


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """The content of cache.json."""

    header: CacheHeader
    """Whose scores they are."""
    num_steps: int
    """Steps of the run that are wanted."""
    num_done: int = 0
    """Steps that are in the shards."""
    num_tokens: int = 0
    """Tokens that are in the shards."""
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name of each shard -> its bytes and crc32."""

    @property
    def is_complete(self) -> bool:
        """Whether every step is there."""
        return self.num_done >= self.num_steps


def write_index(folder: Path, index: CacheIndex) -> None:
    """Write cache.json."""
    content = {"format": FORMAT, **dataclasses.asdict(index)}
    write_text(folder / CACHE_FILE, json.dumps(content, indent=1))


def read_index(folder: Path) -> CacheIndex:
    """Read cache.json.

    Args:
        folder: Folder of the cache.

    Returns:
        Its content.

    Raises:
        MissingFile: The folder holds no cache.
        InvalidInput: The file is of another format or damaged.
    """
    path = folder / CACHE_FILE
    if not path.is_file():
        raise MissingFile(
            f"{folder} holds no cache of a teacher ({CACHE_FILE} is missing); make one with "
            f"`opd cache make {folder} ...`"
        )
    content: Any = parse_json(read_text(path), str(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidInput(
            f"{path} is not of the format {FORMAT}; make the cache again, in another folder"
        )
    try:
        values = dict(content["header"])
        for name in ("teacher_eos", "mapped_eos"):
            values[name] = None if values[name] is None else tuple(values[name])
        return CacheIndex(
            header=CacheHeader(**values),
            num_steps=int(content["num_steps"]),
            num_done=int(content["num_done"]),
            num_tokens=int(content["num_tokens"]),
            shards={name: dict(entry) for name, entry in content["shards"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{path} is damaged ({type(error).__name__}: {error}); make the cache again"
        ) from error


def check_shards(folder: Path, index: CacheIndex) -> None:
    """Refuse a cache with a shard that is missing, truncated or changed.

    Args:
        folder: Folder of the cache.
        index: Its cache.json.

    Raises:
        InvalidInput: Names the first such shard.
    """
    for name, entry in index.shards.items():
        if problem := entry_problem(folder, name, entry):
            raise InvalidInput(
                f"{problem}; restore it, or remove the folder and make the cache again"
            )


def stored_keys(folder: Path, index: CacheIndex) -> set[bytes]:
    """Return the keys of all rows of a cache (`opd.teachers.score_cache.keys`)."""
    keys = set[bytes]()
    for name in index.shards:
        with safe_open(str(folder / name), framework="pt") as file:
            keys.update(row.tobytes() for row in file.get_tensor("keys").numpy())
    return keys


@dataclass(eq=False)
class Shard:
    """Scores that are not on disk yet."""

    keys: list[bytes] = field(default_factory=list)
    """Key of each row."""
    batch_keys: list[bytes] = field(default_factory=list)
    """Key of the batch that each row was scored in."""
    lengths: list[int] = field(default_factory=list)
    """Scored tokens of each row."""
    scores: list[TeacherScores] = field(default_factory=list)
    """Scores of each batch, on the host."""
    num_bytes: int = 0
    """Bytes of the scores."""

    def add(self, keys: list[bytes], key: bytes, lengths: list[int], scores: TeacherScores) -> None:
        """Add a batch.

        Args:
            keys: Key of each row.
            key: Key of the batch.
            lengths: Scored tokens of each row.
            scores: Scores of all tokens, row after row.
        """
        self.keys += keys
        self.batch_keys += [key] * len(keys)
        self.lengths += lengths
        chosen_logp = None if scores.chosen_logp is None else scores.chosen_logp.cpu()
        on_host = TeacherScores(
            scores.ids.cpu(), scores.logp.cpu(), scores.sampled.cpu(), chosen_logp
        )
        self.scores.append(on_host)
        self.num_bytes += sum(x.nbytes for x in vars(on_host).values() if x is not None)

    def save(self, path: Path) -> dict[str, int]:
        """Write the shard, atomically.

        Args:
            path: The file.

        Returns:
            Its entry in cache.json.
        """

        def join(name: str) -> Tensor:
            return torch.cat([getattr(scores, name) for scores in self.scores])

        tensors = {
            "keys": _bytes_tensor(self.keys),
            "batch_keys": _bytes_tensor(self.batch_keys),
            "lengths": torch.tensor(self.lengths),
            "ids": join("ids").int(),
            "logp": join("logp").float(),
            "sampled": join("sampled").float(),
        }
        if self.scores[0].chosen_logp is not None:
            tensors["chosen_logp"] = join("chosen_logp").float()
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)
        return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def _bytes_tensor(keys: list[bytes]) -> Tensor:
    """Return (R, 16) uint8, the keys."""
    return torch.tensor([list(key) for key in keys], dtype=torch.uint8)
