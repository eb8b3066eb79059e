"""What two folders say about each other before anything is sampled: one finding an item.

A finding is "ok", "warn" (training runs, but read this) or "fail" (training would be refused or
would be wrong), with what was found and what to do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd.models.loading import head_rows, load
from opd.tokens.masking import THINK, special_ids
from opd.tokens.token_bytes import shown, token_bytes
from opd.training.checks.check_result import TEXTS, CheckResult, CheckStatus, Numbers

CHATS = {
    "one turn": [("user", "What is 12+34?")],
    "system": [("system", "Be brief."), ("user", "What is 12+34?")],
    "several turns": [("user", "Hi."), ("assistant", "Hello."), ("user", "What is 12+34?")],
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One model of the pair; table holds the bytes of each id, ends the EOS ids by source."""

    name: str
    tokenizer: Any
    network: Any
    table: list[bytes]
    ends: dict[str, tuple[int, ...]]

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a response in training: the tokenizer's first, then the generation's."""
        return tuple(dict.fromkeys(self.ends["tokenizer"] + self.ends["generation_config"]))

    def token(self, index: int | None) -> str:
        """An id as a reader wants it: 151645 '<|im_end|>'."""
        if index is None:
            return "none"
        return f"{index} {shown(self.table[index]) if index < len(self.table) else '(no token)'}"


def read_side(name: str, device: str, dtype: str) -> LoadedModel:
    """Load one model of the pair; nothing is compared yet."""
    tokenizer, network = load(name, device, dtype)
    sources = {
        "tokenizer": tokenizer.eos_token_id,
        "config": network.config.get_text_config().eos_token_id,
        "generation_config": network.generation_config.eos_token_id,
    }
    ends = {source: _listed(value) for source, value in sources.items()}
    return LoadedModel(name, tokenizer, network, token_bytes(tokenizer), ends)


def _listed(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def vocabulary(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Every id must stand for the same bytes: the teacher scores the student's ids."""
    ours, theirs = student.table, teacher.table
    size = max(len(ours), len(theirs))
    pad = [a + [b""] * (size - len(a)) for a in (ours, theirs)]
    differ = [v for v in range(size) if pad[0][v] != pad[1][v]]
    numbers = {"ids": [len(ours), len(theirs)], "different": len(differ), "first": differ[:5]}
    if not differ:
        return CheckResult("vocabulary", "ok", f"{size} ids, the same bytes in both", "", numbers)
    some = ", ".join(f"{v}: {shown(pad[0][v])} / {shown(pad[1][v])}" for v in differ[:5])
    return CheckResult(
        "vocabulary",
        "fail",
        f"{len(differ)} of {size} ids stand for other bytes (student / teacher): {some}",
        "the teacher would score other text than the student wrote; choose a pair with one "
        "vocabulary, or add the missing tokens to the smaller tokenizer in the order of their ids",
        numbers,
    )


def segmentation(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Both tokenizers should cut text at the same bytes; else the teacher knows other pieces."""
    habits = [[_cut(side, text) for text in TEXTS] for side in (student, teacher)]
    differ = [i for i in range(len(TEXTS)) if habits[0][i] != habits[1][i]]
    tag = "|".join(piece.decode("utf-8", "replace") for piece in _cut(student, THINK[0]))
    numbers = {"texts": len(TEXTS), "different": len(differ), "think": tag}
    if not differ:
        return CheckResult(
            "segmentation", "ok", f"sample texts cut alike; think tag: {tag}", "", numbers
        )
    ours, theirs = (habit[differ[0]] for habit in habits)
    at = same_from_start(ours, theirs)
    parts = [" ".join(map(shown, habit[at : at + 4])) for habit in (ours, theirs)]
    return CheckResult(
        "segmentation",
        "warn",
        f"{len(differ)} of {len(TEXTS)} sample texts are cut otherwise: {parts[0]} / {parts[1]}",
        "the teacher was trained on other pieces than the student writes; compare merges and "
        "pre-tokenizer, or mask the strings concerned (string:TEXT)",
        numbers,
    )


def _cut(side: LoadedModel, text: str) -> list[bytes]:
    return [side.table[i] for i in side.tokenizer.encode(text, add_special_tokens=False)]


def special_tokens(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Roles (bos, pad, unk) and which tokens are special; ends have an item of their own."""
    differ = []
    for role in ("bos", "pad", "unk"):
        ours, theirs = (getattr(s.tokenizer, f"{role}_token_id") for s in (student, teacher))
        if ours != theirs:
            differ.append(f"{role}: {student.token(ours)} / {teacher.token(theirs)}")
    ours, theirs = (set(special_ids(s.tokenizer)) for s in (student, teacher))
    # the end of one may be an ordinary special token of the other
    flags = (ours ^ theirs) - set(student.eos) - set(teacher.eos)
    for v in sorted(flags)[:5]:
        where = "student" if v in ours else "teacher"
        side = student if v in ours else teacher
        differ.append(f"{side.token(v)} is special for the {where} only")
    numbers = {"special": [len(ours), len(theirs)]}
    if not differ:
        tags = [tag for tag in THINK if tag.encode() in student.table]
        known = ", ".join(tags) if tags else "no think tag"
        found = f"{numbers['special'][0]} special tokens, the same roles; one token each: {known}"
        return CheckResult("special tokens", "ok", found, "", numbers)
    return CheckResult(
        "special tokens",
        "warn",
        "; ".join(differ),
        "special tokens are cut and decoded otherwise than ordinary ones; make both tokenizers "
        "agree, or mask the token (token:TEXT)",
        numbers | {"differences": differ},
    )


def end_tokens(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Both models should end a response with the same ids, and the template with one of them."""
    ours, theirs = set(student.eos), set(teacher.eos)
    numbers: Numbers = {"student": student.ends, "teacher": teacher.ends}
    names = [" ".join(side.token(v) for v in side.eos) or "none" for side in (student, teacher)]
    verdict: CheckStatus = "ok"
    found, advice = f"both end with {names[0]}", ""
    if not ours or not theirs:
        verdict, found = "fail", f"no end token is known: student {names[0]}, teacher {names[1]}"
        advice = "set tokenizer.eos_token or generation_config.eos_token_id"
    elif ours != theirs:
        verdict = "warn" if ours & theirs else "fail"
        found = f"student ends with {names[0]}, teacher with {names[1]}"
        advice = (
            "read the teacher at its own end (opd.tokens.masking.Endings), or mask the end (role:eos); "
            "else each finished response costs tens of nats at its last token"
        )
    elif not set(student.ends["config"]) <= ours:
        outside = [student.token(v) for v in student.ends["config"] if v not in ours]
        verdict, found = "warn", f"{found}; the student's config also ends with {outside}"
        advice = "make config, generation_config and tokenizer agree"
    closing = turn_end(student)
    if verdict == "ok" and closing is not None and closing not in ours:
        verdict = "warn"
        found = f"{found}, but its chat template ends a turn with {student.token(closing)}"
        advice = "add that id to generation_config.eos_token_id, or responses never stop"
    return CheckResult("end tokens", verdict, found, advice, numbers)


def turn_end(side: LoadedModel) -> int | None:
    """The special token that the chat template puts behind an assistant's turn, if it does."""
    text, _ = render(side, [("user", "Hi."), ("assistant", "ANSWER")], prompt=False)
    if text is None or "ANSWER" not in text:
        return None
    ids = side.tokenizer.encode(text.rsplit("ANSWER", 1)[1], add_special_tokens=False)
    return ids[0] if ids and ids[0] in special_ids(side.tokenizer) else None


def render(
    side: LoadedModel, chat: list[tuple[str, str]], *, prompt: bool = True
) -> tuple[str | None, str]:
    """(text, "") of a chat, or (None, why) where the template refuses it."""
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
    """The teacher reads prompts in the student's template; does it know them?"""
    has = [side.tokenizer.chat_template is not None for side in (student, teacher)]
    advice = (
        "the teacher scores the student's prompts as they are; give both the template that the "
        "teacher was trained with, or expect a teacher that is lost from the first token"
    )
    if not any(has):
        return CheckResult(
            "chat template", "ok", "neither has one; prompts are encoded as they are"
        )
    if not all(has):
        lacking = "teacher" if has[0] else "student"
        return CheckResult("chat template", "warn", f"the {lacking} has no chat template", advice)
    differ = []
    for name, chat in CHATS.items():
        ours, theirs = (render(side, chat) for side in (student, teacher))
        if ours[0] is None and theirs[0] is None:
            continue
        if ours[0] is None or theirs[0] is None:
            who = "student" if ours[0] is None else "teacher"
            differ.append(f"{name}: the {who}'s template refuses it ({ours[1] or theirs[1]})")
        elif ours[0] != theirs[0]:
            differ.append(f"{name}: {first_difference(ours[0], theirs[0])}")
    numbers = {"chats": len(CHATS), "different": len(differ), "differences": differ}
    if differ:
        return CheckResult("chat template", "warn", "; ".join(differ), advice, numbers)
    refused = [name for name, chat in CHATS.items() if render(student, chat)[0] is None]
    found = f"{len(CHATS) - len(refused)} sample chats are rendered alike"
    if refused:
        found += f"; both templates refuse: {', '.join(refused)}"
    return CheckResult("chat template", "ok", found, "", numbers)


def same_from_start(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def first_difference(ours: str, theirs: str, around: int = 24) -> str:
    """Both texts from just before the first character in which they differ."""
    shared = same_from_start(ours, theirs)
    begin = max(0, shared - around // 3)
    parts = [text[begin : shared + around] for text in (ours, theirs)]
    return f"{parts[0]!r} / {parts[1]!r} at character {shared}"


def bos(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """A template that writes BOS, encoded with special tokens, has it twice."""
    side, first = student.tokenizer, student.tokenizer.bos_token_id
    if first is None:
        return CheckResult("bos", "ok", "the student has no BOS token")
    plain = side.encode("Hi.")
    adds = bool(plain) and plain[0] == first
    if side.chat_template is None:
        return CheckResult("bos", "ok", "added by the tokenizer" if adds else "not in use")
    text, _ = render(student, CHATS["one turn"])
    ids = side.encode(text, add_special_tokens=False) if text is not None else []
    writes = sum(v == first for v in ids[:2]) if ids and ids[0] == first else 0
    numbers = {"template": writes, "tokenizer": int(adds)}
    if writes > 1:
        advice = "remove one BOS from the chat template"
        return CheckResult("bos", "fail", "the chat template writes BOS twice", advice, numbers)
    if writes and adds:
        return CheckResult(
            "bos",
            "warn",
            "the chat template writes BOS and the tokenizer adds another",
            "opd encodes templated prompts with add_special_tokens=False; do the same elsewhere",
            numbers,
        )
    if adds and not writes:
        return CheckResult(
            "bos",
            "warn",
            "the tokenizer adds BOS to plain text, but templated prompts have none",
            "check that both models were trained so; else put BOS into the chat template",
            numbers,
        )
    return CheckResult(
        "bos", "ok", "written by the template" if writes else "not in use", "", numbers
    )


def padding(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """PAD that is an end token: masks made from ids lose every end."""
    pad = student.tokenizer.pad_token_id
    if pad is None or pad not in student.eos:
        return CheckResult("padding", "ok", f"pad is {student.token(pad)}, no end token")
    return CheckResult(
        "padding",
        "warn",
        f"pad is {student.token(pad)}, which ends responses too",
        "opd masks by position, so nothing is lost here; code that masks by `id != pad` never "
        "supervises the end: give such code another pad token",
    )


def heads(student: LoadedModel, teacher: LoadedModel) -> CheckResult:
    """Rows of both heads beside the tokenizer; training cuts both to the smaller."""
    rows = [head_rows(side.network) for side in (student, teacher)]
    need = [len(side.table) for side in (student, teacher)]
    found = f"rows {rows[0]} / {rows[1]}, tokens {need[0]} / {need[1]}"
    numbers = {"rows": rows, "tokens": need}
    if min(rows) < max(need):
        advice = "resize_token_embeddings, or take models made for this tokenizer"
        return CheckResult("head rows", "fail", f"{found}: tokens without a row", advice, numbers)
    if rows[0] != rows[1]:
        who = "student" if rows[0] > rows[1] else "teacher"
        cut = f"{found}: the last {abs(rows[0] - rows[1])} of the {who}, no token, are cut"
        advice = "nothing to do: neither model puts mass on cut rows in training or scoring"
        return CheckResult("head rows", "warn", cut, advice, numbers)
    spare = rows[0] - need[0]
    return CheckResult(
        "head rows", "ok", f"{found}" + (f", {spare} spare" if spare else ""), "", numbers
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
