"""A teacher on a server: log-probabilities of token ids over vLLM's OpenAI-compatible protocol.

    python -m vllm.entrypoints.openai.api_server --model TEACHER --max-logprobs 64

`/v1/completions` takes token ids and returns, for every one of them, the log-probability under the
whole softmax at temperature 1 and the K most probable ids (`prompt_logprobs`). Free of torch.

What a server cannot tell: log-probabilities of ids that were not sampled and are not among its own
K, and so the supports "student" and "union"; whole distributions, and so the `full_` objectives,
the local KL, entropies and ranks; hidden states, and so the gradient probe; another temperature.

Shapes: L ids of a sequence, n of its positions, K ids a position.
"""

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import write_text
from diagnostics.io.files import short
from opd.serving.json_endpoint import JsonEndpoint
from opd.serving.vllm_protocol import (
    ENTRY_BYTES,
    SPARE_BYTES,
    PositionLogprobs,
    chosen,
    described,
    field,
    read_row,
)

PROBE_TOKENS = 32
ALIKE = 0.25
"""Mean nats by which the probe's answers may differ and still be of one model: bfloat16 in batches
of other sizes differs by a few hundredths, another model by several nats."""
ROWS, TOKENS = 4, 8192
"""Most sequences of one question, and most ids of one with several; an answer is read in memory."""
PIECE = 512
"""Ids whose text is compared at once."""
SCRIPTS = " ".join(
    chr(c) for c in (*range(33, 127), *range(161, 0x2400, 11), *range(0x3041, 0xD7FF, 199))
)
"""Characters of many scripts, between spaces."""


class TeacherClient:
    """A teacher behind a URL; made by `connect`, which checks it.

    model: the name by which the server knows it; limit: the most ids of a sequence, with one that
    is drawn, if the server says; known: its answer to the probe.
    """

    def __init__(
        self, endpoint: JsonEndpoint, model: str, limit: int | None, vocabulary: int, in_flight: int
    ) -> None:
        self.endpoint, self.model, self.limit = endpoint, model, limit
        self.vocabulary, self.in_flight = vocabulary, in_flight
        draw = random.Random(0)
        self.probe = [draw.randrange(vocabulary) for _ in range(PROBE_TOKENS - 1)]
        self.probe.append(vocabulary - 1)  # a teacher with fewer ids than the student refuses it
        self.known: NDArray[np.float32] | None = None

    def tell(
        self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], k: int
    ) -> list[PositionLogprobs]:
        """An answer for every sequence, in their order: all of them, or an error.

        Afterwards the server must answer the probe as it did at first, so that a batch is never
        scored by a server that came back with another model.

        Args:
          rows: token ids; places: the positions of each, from 1 on, that are asked of.

        Raises:
          RuntimeError: the server does not answer for too long, or is another model by now.
          ValueError: it answers something else than was asked; names the row and the position.
        """
        some = [i for i, wanted in enumerate(places) if wanted]
        found = dict(zip(some, self._all(some, rows, places, k), strict=True))
        self.check_same()
        nothing = PositionLogprobs(
            np.zeros((0, k), np.int64), np.zeros((0, k), np.float32), np.zeros(0, np.float32)
        )
        return [found.get(i, nothing) for i in range(len(rows))]

    def check_length(self, longest: int) -> None:
        """Refuse sequences of `longest` ids before there is one, if the server cannot read them.

        Raises:
          ValueError: it cannot.
        """
        if self.limit is not None and self.limit < longest + 1:
            raise InvalidInput(
                f"{self.endpoint.url} reads at most {self.limit} ids, and a prompt with its "
                f"response may have {longest}, and one more is drawn; start it with "
                f"--max-model-len {longest + 1}, or lower max_prompt or max_response"
            )

    def check_same(self) -> NDArray[np.float32]:
        """The answer to the probe, if it is that of the first time.

        Raises:
          RuntimeError: the answer is another model's.
        """
        (now,) = self._one([self.probe], [range(1, len(self.probe))], 0, "the probe")
        if self.known is None:
            self.known = now.sampled
        self._compare(now.sampled, self.known)
        return now.sampled

    def remember(self, path: Path) -> None:
        """Keep the answer to the probe in a run's record, or compare it with the one kept there.

        Raises:
          RuntimeError: the run began with another model at this address.
        """
        known = self.check_same()
        record = json.loads(path.read_text()) if path.exists() else {}
        name = f"{self.endpoint.url}#{self.model}"
        if name in record:
            self._compare(np.array(record[name], np.float32), known)
        else:
            write_text(path, json.dumps(record | {name: known.tolist()}))

    def _compare(self, one: NDArray[np.float32], other: NDArray[np.float32]) -> None:
        gap = float(np.abs(one - other).mean())
        if not gap <= ALIKE:
            raise OperationFailed(
                f"{self.endpoint.url} answers as another model than at the start: log-probabilities"
                f" of {len(one)} fixed tokens differ by {gap:.2g} on average, {ALIKE} is "
                f"arithmetic; serve the same model as {self.model!r} again, and the same command "
                "goes on from the last checkpoint"
            )

    def _all(
        self,
        some: list[int],
        rows: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        k: int,
    ) -> list[PositionLogprobs]:
        """The answers of the rows `some`, `in_flight` questions at a time."""
        parts = grouped(some, [len(row) for row in rows])
        self.endpoint.start()
        with ThreadPoolExecutor(self.in_flight) as pool:
            asked = [
                pool.submit(
                    self._one,
                    [rows[i] for i in part],
                    [places[i] for i in part],
                    k,
                    f"rows {', '.join(map(str, part))} of {len(rows)}",
                )
                for part in parts
            ]
            bar = tqdm(
                total=len(parts), desc=f"teacher {self.model}", delay=3, leave=False, disable=None
            )
            try:
                for done in as_completed(asked):
                    done.result()
                    bar.update()
            except BaseException:
                for one in asked:
                    one.cancel()
                self.endpoint.stop()
                raise
            finally:
                bar.close()
        return [answer for done in asked for answer in done.result()]

    def _one(
        self,
        rows: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        k: int,
        about: str,
    ) -> list[PositionLogprobs]:
        """The answers to one question, one for each of its rows."""
        question = {
            "model": self.model,
            "prompt": [list(row) for row in rows],
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 1.0,
            "return_token_ids": True,
        }
        entries = sum(len(row) for row in rows) * (k + 1)
        said = self.endpoint.ask(
            "/completions", question, most=entries * ENTRY_BYTES + SPARE_BYTES, about=about
        )
        try:
            if lacking := sorted({"model", "choices"} - set(said)):
                raise InvalidInput(f"it lacks {lacking[0]!r}: {described(said)}")
            choices = {choice["index"]: choice for choice in said["choices"]}
            if said["model"] != self.model or sorted(choices) != list(range(len(rows))):
                raise InvalidInput(
                    f"model {said['model']!r} answers for rows {sorted(choices)}, asked were "
                    f"{len(rows)} rows of {self.model!r}"
                )
            return [
                read_row(choices[i], row, wanted, k, self.vocabulary)
                for i, (row, wanted) in enumerate(zip(rows, places, strict=True))
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInput(  # from nothing that may quote the server, and with it the key
            self.endpoint.redacted(
                f"{self.endpoint.url} ({about}): the answer is not the one to the question: "
                f"{problem}"
            )
        )


def grouped(some: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The rows in order, in groups of at most ROWS, and of at most TOKENS ids or one row."""
    groups: list[list[int]] = []
    for i in some:
        last = groups[-1] if groups else []
        if last and len(last) < ROWS and sum(sizes[j] for j in last) + sizes[i] <= TOKENS:
            last.append(i)
        else:
            groups.append([i])
    return groups


def connect(
    url: str,
    tokenizer: Any,
    vocabulary: int,
    *,
    k: int,
    patience: float,
    in_flight: int,
) -> TeacherClient:
    """The teacher at `url`, after what can be checked was checked.

    Args:
      url: http://HOST:PORT/v1, with #MODEL behind it where the server has several.
      tokenizer: the student's; the text of every one of its ids must be the server's too.
      vocabulary: the student's ids. k: ids a position that will be asked for.
      patience, in_flight: seconds to wait for a server that fails, and questions at once.

    Raises:
      ValueError: the server has several models, other tokens, or tells fewer log-probabilities
        than K. RuntimeError: it does not answer.
    """
    url, _, name = url.partition("#")
    endpoint = JsonEndpoint(url, patience=patience)
    entry = chosen(endpoint, name)
    check_same_text(endpoint, entry["id"], tokenizer)
    remote = TeacherClient(endpoint, entry["id"], entry.get("max_model_len"), vocabulary, in_flight)
    try:
        remote._one([remote.probe], [range(1, PROBE_TOKENS)], k, f"the probe, with {k} ids")
    except ValueError as error:
        raise InvalidInput(
            f"{error}. The teacher must know ids 0 to {vocabulary - 1} and tell the {k} most "
            f"probable: start the server with --max-logprobs {k}, or lower support_k"
        ) from error
    remote.check_same()
    return remote


def check_same_text(endpoint: JsonEndpoint, model: str, tokenizer: Any) -> None:
    """Refuse a server whose ids mean other text than the student's.

    The text of every id is compared, and the ids of a text in many scripts, because ids that are
    parts of a character have no text of their own.

    Raises:
      ValueError: names the first id that differs; or the server cannot tell.
    """
    side = JsonEndpoint(endpoint.url.removesuffix("/v1"), patience=endpoint.patience)
    reason = (
        "; on-policy distillation scores the student's ids with the teacher, so both need one "
        "vocabulary"
    )

    def theirs(ids: Sequence[int]) -> str:
        question = {"model": model, "tokens": list(ids)}
        most = ENTRY_BYTES * len(ids) + SPARE_BYTES
        answer = side.ask("/detokenize", question, most=most, about="the text of ids")
        text: str = field(side, answer, "prompt", str, "/detokenize")
        return text

    for start in range(0, len(tokenizer), PIECE):
        piece = list(range(start, min(start + PIECE, len(tokenizer))))
        if theirs(piece) == tokenizer.decode(piece):
            continue
        for v in piece:
            ours, other = tokenizer.decode([v]), theirs([v])
            if ours != other:
                raise InvalidInput(
                    endpoint.redacted(
                        f"{endpoint.url} reads the id {v} as {short(other)}, the student as "
                        f"{short(ours)}{reason}"
                    )
                )
    question = {"model": model, "prompt": SCRIPTS, "add_special_tokens": False}
    most = ENTRY_BYTES * len(SCRIPTS) + SPARE_BYTES
    answer = side.ask("/tokenize", question, most=most, about="the ids of a text")
    found = field(side, answer, "tokens", list, "/tokenize")
    own = tokenizer.encode(SCRIPTS, add_special_tokens=False)
    if found != own:
        both = zip_longest(own, found)
        at, (ours, other) = next((i, pair) for i, pair in enumerate(both) if pair[0] != pair[1])
        raise InvalidInput(
            f"{endpoint.url} has the id {other} where the student has {ours}, at place {at} of a "
            f"text in many scripts{reason}"
        )
    side.close()
