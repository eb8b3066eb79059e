"""Checks of two model folders, before anything is sampled: one result per check.

A result is "ok", "warn" (training runs, but read the message) or "fail" (training would be refused
or would be wrong), with what was found and what to do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd.models.loading import known_eos_ids, load_model, num_head_rows
from opd.tokens.masking import THINK, special_ids
from opd.tokens.token_bytes import format_token, token_bytes
from opd.training.checks.check_result import TEXTS, CheckResult, CheckStatus, Numbers

CHATS = {
    "one turn": [("user", "What is 12+34?")],
    "system": [("system", "Be brief."), ("user", "What is 12+34?")],
    "several turns": [("user", "Hi."), ("assistant", "Hello."), ("user", "What is 12+34?")],
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One model of the pair."""

    name: str
    tokenizer: Any
    network: Any
    table: list[bytes]
    """Bytes of each id."""
    ends: dict[str, tuple[int, ...]]
    """EOS ids by source: tokenizer, config, generation_config."""

    @property
    def loaded(self) -> tuple[Any, Any]:
        """Tokenizer and network, as `opd.models.loading.load_model` returns them."""
        return self.tokenizer, self.network

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a response in training: the tokenizer's, then the generation config's."""
        return known_eos_ids(*self.loaded)

    def token(self, index: int | None) -> str:
        """Format an id for a reader: 151645 '<|im_end|>'."""
        if index is None:
            return "none"
        return (
            f"{index} "
            f"{format_token(self.table[index]) if index < len(self.table) else '(no token)'}"
        )


def load_side(name: str, device: str, dtype: str, trust_remote_code: bool = False) -> LoadedModel:
    """Load one model of the pair; nothing is compared yet."""
    tokenizer, network = load_model(name, device, dtype, trust_remote_code)
    sources = {
        "tokenizer": tokenizer.eos_token_id,
        "config": network.config.get_text_config().eos_token_id,
        "generation_config": network.generation_config.eos_token_id,
    }
    ends = {source: _as_tuple(value) for source, value in sources.items()}
    return LoadedModel(name, tokenizer, network, token_bytes(tokenizer), ends)


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def vocabulary(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check that every id has the same bytes: the teacher scores the student's ids."""
    student_table, teacher_table = student.table, teacher.table
    size = max(len(student_table), len(teacher_table))
    padded = [a + [b""] * (size - len(a)) for a in (student_table, teacher_table)]
    different_ids = [v for v in range(size) if padded[0][v] != padded[1][v]]
    numbers = {
        "ids": [len(student_table), len(teacher_table)],
        "different": len(different_ids),
        "first": different_ids[:5],
    }
    if not different_ids:
        return CheckResult(
            "vocabulary", "ok", f"{size} ids with the same bytes in both", "", numbers
        )
    examples = ", ".join(
        f"{v}: {format_token(padded[0][v])} / {format_token(padded[1][v])}"
        for v in different_ids[:5]
    )
    return CheckResult(
        "vocabulary",
        "fail",
        f"{len(different_ids)} of {size} ids have different bytes (student / teacher): {examples}",
        "the teacher would score other text than the student wrote; choose a pair with the same "
        "vocabulary, or add the missing tokens to the smaller tokenizer in the order of their ids",
        numbers,
    )


def segmentation(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check that both tokenizers split text at the same bytes."""
    pieces_by_model = [
        [_token_bytes_of(side, text) for text in TEXTS] for side in (student, teacher)
    ]
    different_texts = [
        i for i in range(len(TEXTS)) if pieces_by_model[0][i] != pieces_by_model[1][i]
    ]
    tag = "|".join(piece.decode("utf-8", "replace") for piece in _token_bytes_of(student, THINK[0]))
    numbers = {"texts": len(TEXTS), "different": len(different_texts), "think": tag}
    if not different_texts:
        return CheckResult(
            "segmentation", "ok", f"sample texts split equally; think tag: {tag}", "", numbers
        )
    student_pieces, teacher_pieces = (pieces[different_texts[0]] for pieces in pieces_by_model)
    position = common_prefix_length(student_pieces, teacher_pieces)
    parts = [
        " ".join(map(format_token, pieces[position : position + 4]))
        for pieces in (student_pieces, teacher_pieces)
    ]
    return CheckResult(
        "segmentation",
        "warn",
        f"{len(different_texts)} of {len(TEXTS)} sample texts are split differently: {parts[0]} / "
        f"{parts[1]}",
        "the teacher was trained on other tokens than the student writes; compare merges and "
        "pre-tokenizer, or mask the strings concerned (string:TEXT)",
        numbers,
    )


def _token_bytes_of(side: LoadedModel, text: str) -> list[bytes]:
    return [side.table[i] for i in side.tokenizer.encode(text, add_special_tokens=False)]


def special_tokens(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check roles (bos, pad, unk) and flags of special tokens; EOS has its own check."""
    differences = []
    for role in ("bos", "pad", "unk"):
        student_ids, teacher_ids = (
            getattr(s.tokenizer, f"{role}_token_id") for s in (student, teacher)
        )
        if student_ids != teacher_ids:
            differences.append(
                f"{role}: {student.token(student_ids)} / {teacher.token(teacher_ids)}"
            )
    student_ids, teacher_ids = (set(special_ids(s.tokenizer)) for s in (student, teacher))
    # EOS of one may be an ordinary special token of the other
    flags = (student_ids ^ teacher_ids) - set(student.eos) - set(teacher.eos)
    for v in sorted(flags)[:5]:
        owner = "student" if v in student_ids else "teacher"
        side = student if v in student_ids else teacher
        differences.append(f"{side.token(v)} is special for the {owner} only")
    numbers = {"special": [len(student_ids), len(teacher_ids)]}
    if not differences:
        tags = [tag for tag in THINK if tag.encode() in student.table]
        tag_names = ", ".join(tags) if tags else "no think tag"
        message = (
            f"{numbers['special'][0]} special tokens, the same roles; one token each: {tag_names}"
        )
        return CheckResult("special tokens", "ok", message, "", numbers)
    return CheckResult(
        "special tokens",
        "warn",
        "; ".join(differences),
        "special tokens are split and decoded differently from ordinary ones; make both "
        "tokenizers agree, or mask the token (token:TEXT)",
        numbers | {"differences": differences},
    )


def end_tokens(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check that both models end with the same ids, and the chat template with one of them."""
    student_ids, teacher_ids = set(student.eos), set(teacher.eos)
    numbers: Numbers = {"student": student.ends, "teacher": teacher.ends}
    names = [" ".join(side.token(v) for v in side.eos) or "none" for side in (student, teacher)]
    verdict: CheckStatus = "ok"
    message, advice = f"both end with {names[0]}", ""
    if not student_ids or not teacher_ids:
        verdict, message = "fail", f"no end token is known: student {names[0]}, teacher {names[1]}"
        advice = "set tokenizer.eos_token or generation_config.eos_token_id"
    elif student_ids != teacher_ids:
        verdict = "warn" if student_ids & teacher_ids else "fail"
        message = f"student ends with {names[0]}, teacher with {names[1]}"
        advice = (
            "map the teacher's EOS (--map-eos), or mask EOS (role:eos); otherwise each finished "
            "response costs tens of nats at its last token"
        )
    elif not set(student.ends["config"]) <= student_ids:
        unlisted = [student.token(v) for v in student.ends["config"] if v not in student_ids]
        verdict, message = "warn", f"{message}; the student's config also ends with {unlisted}"
        advice = "make config, generation_config and tokenizer agree"
    closing = turn_end_id(student)
    if verdict == "ok" and closing is not None and closing not in student_ids:
        verdict = "warn"
        message = f"{message}, but its chat template ends a turn with {student.token(closing)}"
        advice = "add that id to generation_config.eos_token_id, or responses never stop"
    return CheckResult("end tokens", verdict, message, advice, numbers)


def turn_end_id(side: LoadedModel) -> int | None:
    """Return the special token that the chat template puts after an assistant turn, if any."""
    text, _ = render(side, [("user", "Hi."), ("assistant", "ANSWER")], prompt=False)
    if text is None or "ANSWER" not in text:
        return None
    ids = side.tokenizer.encode(text.rsplit("ANSWER", 1)[1], add_special_tokens=False)
    return ids[0] if ids and ids[0] in special_ids(side.tokenizer) else None


def render(
    side: LoadedModel, chat: list[tuple[str, str]], *, prompt: bool = True
) -> tuple[str | None, str]:
    """Render a chat: (text, ""), or (None, reason) where the template rejects it."""
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        text = side.tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
    except TemplateError as error:
        return None, str(error)
    return text, ""


def chat_template(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check that both templates render the same text: the teacher reads the student's prompts."""
    has_template = [side.tokenizer.chat_template is not None for side in (student, teacher)]
    advice = (
        "the teacher scores the student's prompts as they are; give both models the template that "
        "the teacher was trained with, or its scores are unreliable from the first token"
    )
    if not any(has_template):
        return CheckResult(
            "chat template", "ok", "neither has one; prompts are encoded as plain text"
        )
    if not all(has_template):
        model_without_template = "teacher" if has_template[0] else "student"
        return CheckResult(
            "chat template", "warn", f"the {model_without_template} has no chat template", advice
        )
    differences = []
    for name, chat in CHATS.items():
        student_text, teacher_text = (render(side, chat) for side in (student, teacher))
        if student_text[0] is None and teacher_text[0] is None:
            continue
        if student_text[0] is None or teacher_text[0] is None:
            role = "student" if student_text[0] is None else "teacher"
            differences.append(
                f"{name}: the {role}'s template rejects it ({student_text[1] or teacher_text[1]})"
            )
        elif student_text[0] != teacher_text[0]:
            differences.append(f"{name}: {first_difference(student_text[0], teacher_text[0])}")
    numbers = {"chats": len(CHATS), "different": len(differences), "differences": differences}
    if differences:
        return CheckResult("chat template", "warn", "; ".join(differences), advice, numbers)
    refused = [name for name, chat in CHATS.items() if render(student, chat)[0] is None]
    message = f"{len(CHATS) - len(refused)} sample chats are rendered equally"
    if refused:
        message += f"; both templates reject: {', '.join(refused)}"
    return CheckResult("chat template", "ok", message, "", numbers)


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def first_difference(first: str, second: str, width: int = 24) -> str:
    """Return both texts around the first character in which they differ."""
    prefix_length = common_prefix_length(first, second)
    begin = max(0, prefix_length - width // 3)
    parts = [text[begin : prefix_length + width] for text in (first, second)]
    return f"{parts[0]!r} / {parts[1]!r} at character {prefix_length}"


def bos(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check that BOS is neither doubled nor missing.

    A chat template that writes BOS, encoded with special tokens, has it twice.
    """
    side, bos_id = student.tokenizer, student.tokenizer.bos_token_id
    if bos_id is None:
        return CheckResult("bos", "ok", "the student has no BOS token")
    plain_ids = side.encode("Hi.")
    adds_bos = bool(plain_ids) and plain_ids[0] == bos_id
    if side.chat_template is None:
        return CheckResult("bos", "ok", "added by the tokenizer" if adds_bos else "not in use")
    text, _ = render(student, CHATS["one turn"])
    ids = side.encode(text, add_special_tokens=False) if text is not None else []
    num_template_bos = sum(v == bos_id for v in ids[:2]) if ids and ids[0] == bos_id else 0
    numbers = {"template": num_template_bos, "tokenizer": int(adds_bos)}
    if num_template_bos > 1:
        advice = "remove one BOS from the chat template"
        return CheckResult("bos", "fail", "the chat template writes BOS twice", advice, numbers)
    if num_template_bos and adds_bos:
        return CheckResult(
            "bos",
            "warn",
            "the chat template writes BOS and the tokenizer adds another",
            "opd encodes templated prompts with add_special_tokens=False; do the same in other "
            "code",
            numbers,
        )
    if adds_bos and not num_template_bos:
        return CheckResult(
            "bos",
            "warn",
            "the tokenizer adds BOS to plain text, but templated prompts have none",
            "check that both models were trained without BOS; else add it to the chat template",
            numbers,
        )
    return CheckResult(
        "bos", "ok", "written by the template" if num_template_bos else "not in use", "", numbers
    )


def padding(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Check that PAD is not an EOS id: masks computed from ids would drop every EOS."""
    pad = student.tokenizer.pad_token_id
    if pad is None or pad not in student.eos:
        return CheckResult("padding", "ok", f"pad is {student.token(pad)}, not an end token")
    return CheckResult(
        "padding",
        "warn",
        f"pad is {student.token(pad)}, which ends responses too",
        "opd masks by position and is not affected; code that masks by `id != pad` never "
        "supervises EOS: use another pad token there",
    )


def heads(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Compare the rows of both LM heads with the tokenizer; training cuts both to the smaller."""
    rows = [num_head_rows(side.network) for side in (student, teacher)]
    num_tokens = [len(side.table) for side in (student, teacher)]
    message = f"rows {rows[0]} / {rows[1]}, tokens {num_tokens[0]} / {num_tokens[1]}"
    numbers = {"rows": rows, "tokens": num_tokens}
    if min(rows) < max(num_tokens):
        advice = "call resize_token_embeddings, or use models made for this tokenizer"
        return CheckResult("head rows", "fail", f"{message}: tokens without a row", advice, numbers)
    if rows[0] != rows[1]:
        larger_model = "student" if rows[0] > rows[1] else "teacher"
        trimmed = (
            f"{message}: the last {abs(rows[0] - rows[1])} of the {larger_model}, without a token, "
            "are "
            "cut"
        )
        advice = "nothing to do: neither model assigns mass to these rows in training or scoring"
        return CheckResult("head rows", "warn", trimmed, advice, numbers)
    num_spare = rows[0] - num_tokens[0]
    return CheckResult(
        "head rows", "ok", f"{message}" + (f", {num_spare} spare" if num_spare else ""), "", numbers
    )


CHECKS: tuple[Callable[[LoadedModel, LoadedModel], CheckResult], ...] = (
    vocabulary,
    segmentation,
    special_tokens,
    end_tokens,
    chat_template,
    bos,
    padding,
    heads,
)
