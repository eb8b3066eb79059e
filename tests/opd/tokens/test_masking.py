"""Special tokens against slow loops, hand calculation and the tokenizers' own decoding."""

import random
from dataclasses import replace

import pytest
import torch

from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support, flatten
from diagnostics.core.totals import merge
from opd.lab.build import make_tokenizer
from opd.tokens.eos import EosMap, student_support, teacher_tokens
from opd.tokens.mask_rules import MaskRule, parse
from opd.tokens.masking import (
    ResolvedMaskRules,
    audit,
    hits,
    masked,
    removed_by_id,
    resolve,
    supervised,
)
from opd.tokens.token_bytes import alphabet, pieces, token_bytes

TABLE = [b"", b"<", b"think", b">", b"<th", b"ink>", b" <", b"a<", b"<think>", b"nk", b"thi", b"<<"]
TEXTS = [
    "<think> Okay, let's see.",
    " 12+34=46\n\n",
    "naïve café 漢字 🙂🙃",
    "a\t b  c",
    "</think>7",
]


def slow_string(tokens: list[int], mask: list[bool], string: bytes, first: bool) -> list[bool]:
    """One response, byte by byte."""
    real = max((t + 1 for t, keep in enumerate(mask) if keep), default=0)
    owner = [t for t in range(real) for _ in TABLE[tokens[t]]]
    text = b"".join(TABLE[token] for token in tokens[:real])
    out = [False] * len(tokens)
    for i in range(len(text) - len(string) + 1):
        covered = range(owner[i], owner[i + len(string) - 1] + 1)
        if text[i : i + len(string)] == string and any(mask[t] for t in covered):
            for t in covered:
                out[t] = mask[t]
            if first:
                break
    return out


def slow_ids(tokens: list[int], mask: list[bool], ids: tuple[int, ...], first: bool) -> list[bool]:
    seen: set[int] = set()
    out = []
    for token, keep in zip(tokens, mask, strict=True):
        out.append(keep and token in ids and not (first and token in seen))
        if keep:
            seen.add(token)
    return out


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of TABLE, ragged responses with holes; padding is an id that would match."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(TABLE), (7, 23), generator=generator)
    length = torch.randint(0, 24, (7, 1), generator=generator)
    holes = torch.rand(7, 23, generator=generator) < 0.8
    mask = (torch.arange(23) < length) & holes
    return torch.where(torch.arange(23) < length, tokens, 8), mask


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("string", [b"<think>", b"<", b"<<", b"thinkthink", b"k><t", b"<" * 200])
def test_a_string_is_found_however_it_is_split(string: bytes, first: bool) -> None:
    rule = ResolvedMaskRules("s", first, (), (string,), pieces(TABLE))
    total = 0
    for seed in range(12):
        tokens, mask = random_batch(seed)
        expected = [
            slow_string(t, m, string, first)
            for t, m in zip(tokens.tolist(), mask.tolist(), strict=True)
        ]
        got = hits(tokens, mask, rule)
        assert got.tolist() == expected
        assert supervised(tokens, mask, [rule]).tolist() == (mask & ~got).tolist()
        total += int(got.sum())
    assert total > 0 or len(string) == 200, "a test that finds nothing shows nothing"


@pytest.mark.parametrize("first", [False, True])
def test_ids_and_several_rules_equal_a_loop(first: bool) -> None:
    rules = [
        ResolvedMaskRules("i", first, (1, 2, 8), (), pieces(TABLE)),
        ResolvedMaskRules("j", True, (2, 5), (), pieces(TABLE)),
        ResolvedMaskRules("s", first, (), (b"<think>", b"nk"), pieces(TABLE)),
    ]
    for seed in range(12):
        tokens, mask = random_batch(seed)
        for t, m, got in zip(tokens, mask, supervised(tokens, mask, rules), strict=True):
            row, keep = t.tolist(), m.tolist()
            gone = [
                slow_ids(row, keep, (1, 2, 8), first),
                slow_ids(row, keep, (2, 5), True),
                slow_string(row, keep, b"<think>", first),
                slow_string(row, keep, b"nk", first),
            ]
            out = [k and not any(g) for k, g in zip(keep, zip(*gone, strict=True), strict=True)]
            assert got.tolist() == out
        assert supervised(tokens, mask, rules[::-1]).tolist() == (
            supervised(tokens, mask, rules).tolist()
        )


def test_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 3, 9, 4, 5], [4, 5, 1, 2, 3, 8], [0, 1, 2, 0, 3, 1]])
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 5] = False
    whole = ResolvedMaskRules("s", False, (), (b"<think>",), pieces(TABLE))
    assert hits(tokens, mask, whole).long().tolist() == [
        [1, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0],
    ]
    assert hits(tokens, mask, replace(whole, first=True)).long().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
    ]
    beyond = torch.where(tokens == 3, 500, tokens)  # a row of a padded head has no bytes
    assert hits(beyond, mask, whole)[0].long().tolist() == [0, 0, 0, 0, 1, 1]
    doubled = ResolvedMaskRules(
        "s", False, (), (b"<<",), pieces(TABLE)
    )  # the last row of the table
    assert not hits(torch.full((1, 4), 500), mask[:1, :4], doubled).any()
    assert hits(tokens[:1, :3], mask[:1, :3], whole).all(), "nothing but the string"
    empty = torch.zeros(0, 6, dtype=torch.long)
    assert hits(empty, empty.bool(), whole).shape == (0, 6)
    assert not hits(tokens, torch.zeros_like(mask), whole).any()


def test_the_paper_masks_the_first_of_each_of_three_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    response = [ids(t) for t in ["<", "think", ">", "a", "<", "think", ">", "<|im_end|>"]]
    tokens = torch.tensor([response, [ids("a"), *response[:7]]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    rules = resolve(["paper"], tokenizer, [ids("<|im_end|>")])
    expected = [[0, 0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1, 1]]
    assert supervised(tokens, mask, rules).long().tolist() == expected


def word_tokenizer():
    """Qwen's kind of tokenizer with a few merged tokens."""
    from transformers import Qwen2Tokenizer

    words = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        *alphabet(),
        "th",
        "in",
        "thin",
        "think",
    ]
    merges = [("t", "h"), ("i", "n"), ("th", "in"), ("thin", "k")]
    return Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(words)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
    )


def trained_tokenizers() -> dict[str, object]:
    """A byte-level and a SentencePiece-like BPE, trained here, as `transformers` holds them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    found: dict[str, object] = {"qwen": word_tokenizer(), "lab": make_tokenizer()}
    level = Tokenizer(models.BPE())
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    start = pre_tokenizers.ByteLevel.alphabet()
    level.train_from_iterator(TEXTS * 50, BpeTrainer(vocab_size=330, initial_alphabet=start))
    level.add_tokens([AddedToken("漢é ", normalized=False)])
    found["byte level"] = PreTrainedTokenizerFast(tokenizer_object=level)

    sentence = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    sentence.normalizer = normalizers.Replace(" ", "▁")
    sentence.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    lone = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *lone])
    sentence.train_from_iterator(["<think> Okay, see.", " 12+34=46", "a b  c"] * 50, trainer)
    sentence = with_plain_bytes(sentence)
    found["sentence piece"] = PreTrainedTokenizerFast(tokenizer_object=sentence, eos_token="</s>")
    return found


def with_plain_bytes(tokenizer):
    """Lone bytes as ordinary tokens, as in published vocabularies, not special ones."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("name", ["qwen", "lab", "byte level", "sentence piece"])
def test_ids_spell_the_bytes_of_the_text(name: str) -> None:
    tokenizer = trained_tokenizers()[name]
    table = token_bytes(tokenizer)
    generator = random.Random(0)
    texts = TEXTS + ["".join(generator.choices("ab <>think🙂漢é\n12", k=30)) for _ in range(50)]
    longest = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(table[i] for i in ids) == text.encode()
        longest = max(longest, *(len(table[i]) for i in ids))
    assert longest > 1


def test_the_alphabet_is_the_published_one() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_rules_are_read_and_named() -> None:
    assert parse(["id:7", "string:a:b:first", "token:x:all", "role:eos"]) == (
        MaskRule("id", "7"),
        MaskRule("string", "a:b", "first"),
        MaskRule("token", "x"),
        MaskRule("role", "eos"),
    )
    assert [r.name for r in parse(["paper", "token:<:first"])] == [
        "token:<:first",
        "token:think:first",
        "token:<|im_end|>:first",
    ]
    assert parse(["string::first:all"])[0] == MaskRule("string", ":first")
    for rule in parse(["id:7", "string:a:b:first", "paper"]):
        assert parse([rule.name]) == (rule,)
    for bad in (
        "<think>",
        "id:",
        "id:x",
        "id:-1",
        "role:cls",
        "strings:a",
        "string:",
        "papers",
        "",
    ):
        with pytest.raises(ValueError, match="mask rule") as error:
            parse([bad])
        assert repr(bad) in str(error.value)
    with pytest.raises(ValueError, match=r"write id:NUMBER.*role:think.*paper"):
        parse(["nothing"])


def test_roles_and_tokens_become_ids() -> None:
    tokenizer = make_tokenizer()
    ids = {
        rule.name: rule.ids
        for rule in resolve(
            ["role:eos", "role:pad", "role:special", "token:<think>", "token: ", "id:900"],
            tokenizer,
            [1, 2],
        )
    }
    assert ids == {
        "role:eos": (1, 2),
        "role:pad": (2,),
        "role:special": (0, 1, 2, 3, 4),
        "token:<think>": (3,),
        "token: ": (tokenizer.encode(" ")[0],),
        "id:900": (900,),
    }
    assert resolve(["role:think"], tokenizer, [1])[0].strings == (b"<think>", b"</think>")
    with pytest.raises(ValueError, match=r"'role:bos'.*drop the rule"):
        resolve(["role:bos"], tokenizer, [1])
    with pytest.raises(ValueError, match=r"'token:think'.*string:TEXT"):
        resolve(["token:think"], tokenizer, [1])
    text = "<think>3<4</think><|im_end|>"
    row = [*tokenizer.encode("<"), *tokenizer.encode("think"), *tokenizer.encode(">"), 3]
    tokens = torch.tensor([row + tokenizer.encode(text)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    kept = tokens[supervised(tokens, mask, resolve(["role:think"], tokenizer, [1]))]
    assert tokenizer.decode(kept) == "3<4<|im_end|>"
    kept = tokens[supervised(tokens, mask, resolve(["role:think:first"], tokenizer, [1]))]
    assert tokenizer.decode(kept) == "<think><think>3<4<|im_end|>"


def scored_batch(seed: int) -> ScoredRollouts:
    tokens, mask = random_batch(seed)
    generator = torch.Generator().manual_seed(seed)

    def logp(*last: int) -> torch.Tensor:
        x = -torch.rand(*tokens.shape, *last, generator=generator, dtype=torch.float64)
        return torch.where(mask.reshape(mask.shape + (1,) * len(last)), 9 * x, 0.0)

    ids = torch.randint(len(TABLE), (*tokens.shape, 3), generator=generator)
    names = "reverse_kl ratio_square student_entropy teacher_entropy surprise_square collision"
    names += " overrated teacher_max teacher_rank"
    return ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=logp(),
        prompt=torch.tensor([0, 0, 1, 1, 2, 2, 3]),
        ended=torch.zeros(7, dtype=torch.bool),
        student_logp=logp(),
        teacher_logp=logp(),
        baseline=logp(),
        support=Support(ids=ids, student_logp=logp(3), teacher_logp=logp(3), source="teacher"),
        prefix=DistributionStats(**{name: logp() for name in names.split()}),
    )


RULES = [
    ResolvedMaskRules("id:1", False, (1,), (), pieces(TABLE)),
    ResolvedMaskRules("string:nk", False, (), (b"nk",), pieces(TABLE)),
]


def test_a_masked_batch_keeps_what_was_sampled_and_says_why() -> None:
    for whole in (scored_batch(0), Rollouts(**rollout_fields(scored_batch(0)))):
        batch = masked(whole, RULES).checked()
        assert type(batch) is type(whole)
        assert batch.mask_rule == "response - id:1 - string:nk"
        assert batch.mask.tolist() == supervised(whole.tokens, whole.mask, RULES).tolist()
        assert 0 < batch.mask.sum() < whole.mask.sum()
        assert batch.tokens.tolist() == whole.tokens.tolist()
        assert torch.equal(batch.sampled, whole.mask)
        assert torch.equal(batch.sampler_logp, whole.sampler_logp)
        assert masked(whole, []) is whole
    whole, batch = scored_batch(0), masked(scored_batch(0), RULES)
    before, after = flatten(whole), flatten(batch)
    assert after.keys() - before.keys() == {"sampled_mask"}
    assert all(torch.equal(after[name], x) for name, x in before.items() if name not in NOT_NUMBERS)
    again = masked(batch, RULES[:1])
    assert torch.equal(again.mask, batch.mask), "what a rule takes out stays out"
    assert torch.equal(again.sampled, whole.mask)


NOT_NUMBERS = ("mask", "reward")


def test_a_rule_reads_what_was_sampled_whatever_is_supervised() -> None:
    """A first occurrence that another rule took out is still the first one."""
    first = replace(RULES[0], first=True)
    tokens = torch.tensor([[1, 3, 1, 1]])
    batch = Rollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=-torch.ones(1, 4),
        prompt=torch.tensor([0]),
        ended=torch.tensor([True]),
    )
    assert masked(batch, [first]).mask.tolist() == [[False, True, True, True]]
    narrow = batch.supervise(torch.tensor([[False, True, True, True]]))
    assert masked(narrow, [first]).mask.tolist() == [[False, True, True, True]]


def rollout_fields(batch: ScoredRollouts) -> dict[str, torch.Tensor]:
    names = ("tokens", "mask", "sampler_logp", "prompt", "ended", "reward")
    return {name: getattr(batch, name) for name in names}


def test_the_audit_adds_over_steps_and_equals_a_loop() -> None:
    steps = [scored_batch(0), scored_batch(1)]
    whole = [0.0, 0.0, 0.0]
    gone = {name: [0.0, 0.0, 0.0] for name in ("id:1", "string:nk", "all")}
    by_id = torch.zeros(12, 3, dtype=torch.float64)
    for batch in steps:
        for i, (row, keep) in enumerate(
            zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True)
        ):
            out = {"id:1": slow_ids(row, keep, (1,), False)}
            out["string:nk"] = slow_string(row, keep, b"nk", False)
            out["all"] = [a or b for a, b in zip(*out.values(), strict=True)]
            for t in (t for t in range(len(row)) if keep[t]):
                r = float(batch.student_logp[i, t] - batch.teacher_logp[i, t])
                sizes = (1.0, abs(r), r * r)
                whole = [a + b for a, b in zip(whole, sizes, strict=True)]
                for name in (name for name in out if out[name][t]):
                    gone[name] = [a + b for a, b in zip(gone[name], sizes, strict=True)]
                if out["all"][t]:
                    by_id[row[t]] += torch.tensor(sizes, dtype=torch.float64)
    found = merge(audit(steps[0], RULES), audit(steps[1], RULES))
    for name, sums in gone.items():
        for what, part, of in zip(("tokens", "signal", "energy"), sums, whole, strict=True):
            total = found[f"mask/{name}/{what}"]
            assert 0 < part < of
            assert float(total.total) == pytest.approx(part)
            assert float(total.count) == pytest.approx(of)
    assert len(found) == 9
    sums = sum(removed_by_id(b, masked(b, RULES).mask, 12) for b in steps)
    torch.testing.assert_close(sums, by_id)
    assert gone["all"][0] < gone["id:1"][0] + gone["string:nk"][0] + 1


def test_a_foreign_end_is_read_as_ones_own() -> None:
    endings = EosMap(student=(45, 46), teacher=(43, 46))
    tokens = torch.tensor([[5, 45, 0], [43, 46, 7]])
    assert teacher_tokens(tokens, endings).tolist() == [[5, 43, 0], [43, 46, 7]]
    ids = torch.tensor([[[43, 5, 45, 46], [45, 6, 43, 7], [1, 2, 3, 43]]])
    read, counts = student_support(ids, endings)
    assert read.tolist() == [[[45, 5, 45, 46], [45, 6, 45, 7], [1, 2, 3, 45]]]
    assert counts.tolist() == [
        [[True, True, False, True], [True, True, False, True], [True, True, True, True]]
    ]
    same = EosMap(student=(45, 46), teacher=(46, 45))
    assert torch.equal(teacher_tokens(tokens, same), tokens)
    assert torch.equal(student_support(ids, same)[0], ids)


def test_the_ending_is_scored_where_the_teacher_ends(tiny_pair) -> None:
    """A teacher whose end has another id gives a response the log-prob of its own end."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(tiny_pair[1])
    twin = AutoModelForCausalLM.from_pretrained(tiny_pair[1])
    rows = twin.get_output_embeddings()
    rows.weight = torch.nn.Parameter(rows.weight.detach().clone())  # untied from the inputs
    with torch.no_grad():
        rows.weight[[1, 2]] = rows.weight[[2, 1]]
    context, response = [0, 40, 41], [50, 51, 1]
    ids = torch.tensor([context + response])
    with torch.no_grad():
        ours = teacher(ids).logits.log_softmax(-1)[0, 2:5]
        theirs = twin(ids).logits.log_softmax(-1)[0, 2:5]
    tokens = torch.tensor(response)
    read = teacher_tokens(tokens, EosMap(student=(1,), teacher=(2,)))
    plain = theirs.gather(-1, tokens[:, None])[:, 0]
    moved = theirs.gather(-1, read[:, None])[:, 0]
    expected = ours.gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(moved, expected)
    assert abs(float(plain[-1] - expected[-1])) > 0.1
