"""Reading a cache: the scores of the rows of a batch.

Shapes: B responses, N sampled tokens, K ids per token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.data.prompts import Prompts
from opd.teachers.remote_scores import TeacherScores
from opd.teachers.score_cache.files import CacheHeader, check_shards, read_index
from opd.teachers.score_cache.identity import tokenizer_fingerprint
from opd.teachers.score_cache.keys import batch_key, row_keys


@dataclass(frozen=True)
class CachedRow:
    """Where the scores of a row are."""

    batch: bytes
    """Key of the batch that it was scored in."""
    shard: int
    """Number of the shard."""
    start: int
    """Its first token in the shard."""
    stop: int
    """The token after its last one."""


@dataclass(eq=False)
class ScoreCache:
    """A complete cache, whose shards are read as their rows are asked for."""

    folder: Path
    """Its folder."""
    header: CacheHeader
    """Whose scores it holds."""
    shards: list[Any]
    """Open safetensors files."""
    rows: dict[bytes, list[CachedRow]]
    """Key of each row -> where it was scored, once or more often."""

    def lookup(self, prompts: Prompts, rollouts: Rollouts, k: int) -> TeacherScores:
        """Return the scores of a batch.

        Of several scorings of a row, that in the same batch is taken, which has its bits.

        Args:
            prompts: B prompts, as the teacher reads them.
            rollouts: B responses.
            k: Number of ids per token.

        Returns:
            The scores, on the device of the responses.

        Raises:
            InvalidInput: A row is not in the cache, or it holds fewer ids.
        """
        self.check_k(k)
        keys = row_keys(prompts, rollouts)
        if absent := [i for i, key in enumerate(keys) if key not in self.rows]:
            raise InvalidInput(
                f"{len(absent)} of {len(keys)} responses of a batch are not in the cache "
                f"{self.folder}, the first in row {absent[0]}; make it with the data, seed, "
                "steps, prompts and lengths of the run (opd cache make)"
            )
        whole = batch_key(keys)
        places = [
            next((x for x in self.rows[key] if x.batch == whole), self.rows[key][0]) for key in keys
        ]
        device = rollouts.tokens.device

        def read(name: str) -> torch.Tensor:
            parts = [self.shards[x.shard].get_slice(name)[x.start : x.stop] for x in places]
            return torch.cat(parts).to(device)

        return TeacherScores(
            read("ids").long()[:, :k],
            read("logp")[:, :k],
            read("sampled"),
            None if self.header.mapped_eos is None else read("chosen_logp"),
        )

    def num_absent(self, prompts: Prompts, rollouts: Rollouts) -> int:
        """Return how many rows of a batch are not in the cache."""
        return sum(key not in self.rows for key in row_keys(prompts, rollouts))

    def check_k(self, k: int) -> None:
        """Refuse more ids per token than there are.

        Args:
            k: Number of ids.

        Raises:
            InvalidInput: The cache holds fewer.
        """
        if k > self.header.support_k:
            raise InvalidInput(
                f"support_k is {k}, but the cache {self.folder} holds the teacher's "
                f"{self.header.support_k} most probable ids; lower support_k, or make the cache "
                "again with more"
            )

    def check_temperature(self, temperature: float) -> None:
        """Refuse scores at another temperature.

        Args:
            temperature: That of the loss.

        Raises:
            InvalidInput: The cache has another one.
        """
        if temperature != self.header.temperature:
            raise InvalidInput(
                f"temperature is {temperature:g}, but the scores of the cache {self.folder} were "
                f"computed at {self.header.temperature:g}; set that, or make the cache again"
            )

    def check_eos(self, student_eos: tuple[int, ...] | None) -> None:
        """Refuse another mapping of EOS ids.

        Args:
            student_eos: EOS ids of the student that the loss maps; None if it maps none.

        Raises:
            InvalidInput: The cache was made with others, or without.
        """
        mapped = self.header.mapped_eos
        if (mapped is None) != (student_eos is None):
            made, wanted = ("with", "off") if student_eos is None else ("without", "on")
            raise InvalidInput(
                f"the cache {self.folder} was made {made} map_eos, but it is {wanted}; change the "
                "setting, or make the cache again"
            )
        if mapped is not None and student_eos is not None and {*mapped} != {*student_eos}:
            raise InvalidInput(
                f"the cache {self.folder} maps the EOS ids {sorted(mapped)} of the student, which "
                f"has {sorted(student_eos)}; make the cache again"
            )


def open_cache(folder: Path, tokenizer: Any, vocabulary: int) -> ScoreCache:
    """Open a complete cache, and check all of its files.

    Args:
        folder: Folder of the cache.
        tokenizer: The student's tokenizer.
        vocabulary: Number of ids of the student.

    Returns:
        The cache.

    Raises:
        InvalidInput: It is not complete, damaged, or of another tokenizer or vocabulary.
        MissingFile: There is none.
    """
    index = read_index(folder)
    if not index.is_complete:
        raise InvalidInput(
            f"the cache {folder} holds {index.num_done} of {index.num_steps} steps; finish it with "
            "the command that began it (opd cache make)"
        )
    check_shards(folder, index)
    header = index.header
    if header.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise InvalidInput(
            f"the cache {folder} was made with another tokenizer than the student's; make it again "
            "with this student"
        )
    if header.vocabulary > vocabulary:
        raise InvalidInput(
            f"the cache {folder} holds ids up to {header.vocabulary - 1}, but the student has "
            f"{vocabulary} ids; make it again with this student"
        )
    shards, rows = [], dict[bytes, list[CachedRow]]()
    for number, name in enumerate(index.shards):
        shard = safe_open(str(folder / name), framework="pt")
        shards.append(shard)
        stops = shard.get_tensor("lengths").cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        keys = shard.get_tensor("keys").numpy()
        batch_keys = shard.get_tensor("batch_keys").numpy()
        for key, batch, start, stop in zip(keys, batch_keys, starts, stops, strict=True):
            place = CachedRow(batch.tobytes(), number, start, stop)
            rows.setdefault(key.tobytes(), []).append(place)
    return ScoreCache(folder, header, shards, rows)
