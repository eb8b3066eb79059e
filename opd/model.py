"""Models: loading a pair, and from token ids to log-probabilities without keeping (tokens, V).

The one place that aligns hidden states with response tokens, and the one place that applies a
head. Shapes: B responses, P prompt positions, T response positions, N supervised tokens (flat),
D hidden size, V shared vocabulary, K support.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diagnostics.batch import Prefix, Rollouts, Scored, Support
from diagnostics.prefix import functionals
from opd.data import Prompts
from opd.objectives import Objective
from opd.surrogates import Visited


@dataclass(frozen=True, eq=False)
class Model:
    """A causal LM, split into what makes hidden states and what turns them into logits.

    network: the Hugging Face model; hidden: (ids, attention mask, positions) -> (B, L, D); head:
    (N, D) -> (N, V) in float32, cut to the vocabulary that the pair shares.
    """

    network: Any
    hidden: Callable[[Tensor, Tensor, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocabulary: int

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


@dataclass(frozen=True, eq=False)
class Pair:
    """A student, its frozen teacher, their tokenizer and the ids that end a response."""

    student: Model
    teacher: Model
    tokenizer: Any
    eos: list[int]


def load_pair(student: str, teacher: str, device: str, dtype: str) -> Pair:
    """Load both models.

    Raises:
      ValueError: the tokenizers differ, or no end-of-sequence token is known.
    """
    tokenizer, network = load(student, device, dtype)
    other, frozen = load(teacher, device, dtype)
    check_same_vocabulary(tokenizer, other)
    eos = end_ids(tokenizer, network)
    vocabulary = min(head_rows(network), head_rows(frozen))
    frozen.requires_grad_(False)
    return Pair(split(network, vocabulary), split(frozen, vocabulary), tokenizer, eos)


def load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or hub name, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not name:
        raise ValueError("no model given; name a folder or a hub model for --student and --teacher")
    if name.startswith((".", "/", "lab/", "lab-tiny/")) and not Path(name).is_dir():
        hint = "; build it with `opd lab`" if name.startswith("lab") else ""
        hint += " --tiny" if name.startswith("lab-tiny") else ""
        raise FileNotFoundError(f"model folder {name!r} does not exist{hint}")
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return tokenizer, model.to(resolve_device(device)).eval()


def resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Refuse a pair whose token ids mean different strings."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differ = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    shown = ", ".join(f"{t!r}: {ours.get(t)} / {theirs.get(t)}" for t in differ[:5])
    raise ValueError(
        f"student and teacher tokenizers differ in {len(differ)} of {len(ours)} / {len(theirs)} "
        f"tokens (id of student / teacher: {shown}); on-policy distillation scores the student's "
        "ids with the teacher, so both need one vocabulary"
    )


def end_ids(tokenizer: Any, network: Any) -> list[int]:
    """Ids that end a response: the tokenizer's and the generation config's."""
    listed = network.generation_config.eos_token_id
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise ValueError(
            "no end-of-sequence token: set tokenizer.eos_token or generation_config.eos_token_id; "
            "without one every rollout runs to its budget"
        )
    return sorted(ids)


def head_rows(network: Any) -> int:
    return network.get_output_embeddings().weight.shape[0]


def split(network: Any, vocabulary: int) -> Model:
    """Split a model at its head, after a check that head(hidden) are the model's own logits.

    A model whose logits are not a plain head of its decoder's hidden states (a soft-cap, a scale)
    is used through `.logits`; that costs (B, L, V) memory, and a warning says so.
    """
    decoder, output = network.get_decoder(), network.get_output_embeddings()

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out = decoder(
            input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
        )
        return out.last_hidden_state

    def logits(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out = network(
            input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
        )
        return out.logits

    device = next(network.parameters()).device
    ids = torch.arange(4, device=device)[None] % vocabulary
    with torch.no_grad():
        probe = (ids, torch.ones_like(ids), torch.arange(4, device=device)[None])
        ours, theirs = output(hidden(*probe)), logits(*probe)
    if torch.allclose(ours.float(), theirs.float(), atol=1e-4, rtol=1e-3, equal_nan=True):
        return Model(network, hidden, lambda h: output(h).float()[..., :vocabulary], vocabulary)
    size = network.config.get_text_config().vocab_size
    warnings.warn(
        f"{type(network).__name__} changes its logits after the head; falling back to `.logits`, "
        f"which keeps {size} numbers for every token of a micro-batch",
        stacklevel=2,
    )
    return Model(network, logits, lambda z: z.float()[..., :vocabulary], vocabulary)


def response_hidden(model: Model, prompts: Prompts, batch: Rollouts) -> Tensor:
    """(N, D) hidden states that predict the supervised tokens, in row-major order.

    The state at sequence position j predicts token j + 1, so response token t is predicted at
    P - 1 + t. Positions count real tokens only, so that left padding changes nothing.
    """
    ids = torch.cat([prompts.tokens, batch.tokens], 1)[:, :-1]
    real = torch.cat([prompts.mask, _response_real(batch)], 1)[:, :-1].long()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    states = model.hidden(ids, real, positions)
    width = prompts.tokens.shape[1]
    return states[:, width - 1 :][batch.mask]


def _response_real(batch: Rollouts) -> Tensor:
    """(B, T) positions up to the last supervised one: masks may have holes, attention has none."""
    return batch.mask.long().flip(1).cumsum(1).flip(1) > 0


def micro_batches(prompts: Prompts, batch: Rollouts, tokens: int) -> list[list[int]]:
    """Rows grouped by length so that rows x longest (prompt and response) stays under `tokens`."""
    ends = [int(x) for x in _response_real(batch).sum(1)]
    sizes = [int(p) + e for p, e in zip(prompts.mask.sum(1), ends, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        widest = sizes[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * widest <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@torch.no_grad()
def score(
    pair: Pair,
    prompts: Prompts,
    batch: Rollouts,
    *,
    k: int,
    source: str = "teacher",
    temperature: float,
    micro_tokens: int,
    chunk_elements: int,
    keep_teacher: bool,
) -> tuple[Scored, Tensor | None]:
    """Put both models' log-probs, a top-K support and the prefix functionals on a batch.

    The support holds the K most probable ids of the `source`, "teacher" or "student".

    Logits exist for one chunk of tokens at a time. With `keep_teacher`, the teacher's hidden
    states (N, D), row-major over the mask, are returned for losses that need its whole vocabulary.
    """
    if k > pair.student.vocabulary:
        raise ValueError(
            f"support_k is {k}, but the shared vocabulary has {pair.student.vocabulary} tokens"
        )
    n, device = int(batch.mask.sum()), batch.tokens.device
    slot = _slots(batch.mask)
    flat: dict[str, Tensor] = {}
    kept: Tensor | None = None

    def put(name: str, where: Tensor, value: Tensor) -> None:
        if name not in flat:
            flat[name] = torch.zeros((n, *value.shape[1:]), dtype=value.dtype, device=device)
        flat[name][where] = value

    for rows in micro_batches(prompts, batch, micro_tokens):
        part = batch.rows(rows).trimmed()
        some = prompts.rows(rows)
        where = slot[rows][:, : part.mask.shape[1]][part.mask]
        ours = response_hidden(pair.student, some, part)
        theirs = response_hidden(pair.teacher, some, part)
        tokens = part.tokens[part.mask]
        if keep_teacher:
            kept = theirs.new_zeros((n, theirs.shape[1])) if kept is None else kept
            kept[where] = theirs
        for c in chunks(len(tokens), pair.student.vocabulary, chunk_elements):
            p = log_probabilities(pair.student, ours[c], temperature)
            q = log_probabilities(pair.teacher, theirs[c], temperature)
            ids = (p if source == "student" else q).topk(k, -1).indices
            y = tokens[c, None]
            put("student_logp", where[c], p.gather(-1, y)[:, 0])
            put("teacher_logp", where[c], q.gather(-1, y)[:, 0])
            put("support.ids", where[c], ids)
            put("support.teacher_logp", where[c], q.gather(-1, ids))
            put("support.student_logp", where[c], p.gather(-1, ids))
            for name, value in functionals(p, q, tokens[c]).items():
                put(f"prefix.{name}", where[c], value)

    full = {name: spread(value, batch.mask) for name, value in flat.items()}
    fields = dict(vars(batch))
    scored = Scored(
        **fields,
        student_logp=full["student_logp"],
        teacher_logp=full["teacher_logp"],
        support=Support(source=source, **_under(full, "support.")),
        prefix=Prefix(**_under(full, "prefix.")),
        score_temperature=temperature,
    )
    return scored.checked(), kept


def log_probabilities(model: Model, hidden: Tensor, temperature: float) -> Tensor:
    """(n, D) -> (n, V) float32 log-softmax at the loss temperature."""
    return (model.head(hidden) / temperature).log_softmax(-1)


def loss_from_hidden(
    pair: Pair,
    objective: Objective,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    part: Scored,
    credit: Tensor,
    weight: Tensor,
    *,
    chunk_elements: int,
) -> Tensor:
    """Scalar sum over supervised tokens of weight x surrogate, with gradient to `hidden`.

    Args:
      hidden: (N, D) student states; teacher_hidden: (N, D') for objectives on the full vocabulary.
      part: the micro-batch; credit: (B, T) of the same rows; weight: (N,) one over denominator.

    Each chunk's logits are recomputed in the backward pass, so that none are kept.
    """
    mask, temperature = part.mask, part.score_temperature
    tokens, credit, teacher_logp = part.tokens[mask], credit[mask], part.teacher_logp[mask]
    support = part.support
    topk = objective.support in ("teacher", "student")
    if topk and (support is None or support.source != objective.support):
        raise ValueError(
            f"the objective needs the {objective.support}'s top-K, the batch has no such support"
        )
    ids = support.ids[mask] if support is not None else None
    theirs = support.teacher_logp[mask] if support is not None else None

    def chunk(h: Tensor, c: slice) -> Tensor:
        p = log_probabilities(pair.student, h, temperature)
        ours_on, theirs_on = None, None
        if objective.support == "full":
            if teacher_hidden is None:
                raise ValueError("the objective compares whole vocabularies; no teacher states")
            ours_on = p
            with torch.no_grad():
                theirs_on = log_probabilities(pair.teacher, teacher_hidden[c], temperature)
        elif topk and ids is not None and theirs is not None:
            ours_on, theirs_on = p.gather(-1, ids[c]), theirs[c]
        at = Visited(
            logp=p.gather(-1, tokens[c, None])[:, 0],
            credit=credit[c],
            teacher_logp=teacher_logp[c],
            support_logp=ours_on,
            teacher_support_logp=theirs_on,
            inside=None if ids is None else (ids[c] == tokens[c, None]).any(-1),
        )
        return (objective.surrogate(at) * weight[c]).sum()

    total = hidden.new_zeros((), dtype=torch.float32)
    for c in chunks(len(tokens), pair.student.vocabulary, chunk_elements):
        total = total + checkpoint(chunk, hidden[c], c, use_reentrant=False)
    return total


def chunks(count: int, vocabulary: int, elements: int) -> list[slice]:
    """Slices of at most elements / vocabulary tokens."""
    size = max(1, elements // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """(N, ...) row-major over the mask -> (B, T, ...), 0 elsewhere."""
    out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    out[mask] = flat
    return out


def _slots(mask: Tensor) -> Tensor:
    """(B, T) row of each supervised token in the flat order."""
    return (mask.flatten().cumsum(0) - 1).reshape(mask.shape)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
