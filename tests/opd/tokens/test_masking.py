"""Mask rules against slow loops, hand calculation and the tokenizers' own decoding."""

import random
from dataclasses import replace

import pytest
import torch

from diagnostics.batch import DistributionStats, Rollouts, ScoredRollouts, Support
from diagnostics.core.totals import merge
from diagnostics.records.vocabulary import byte_alphabet
from diagnostics.tensor_fields import flatten
from opd.lab.build import make_tokenizer
from opd.tokens.eos import EosMap, student_support, teacher_tokens
from opd.tokens.mask_rules import MaskRule, parse_rules
from opd.tokens.masking import (
    ResolvedMaskRules,
    apply_mask_rules,
    mask_rule_metrics,
    resolve_mask_rules,
    rule_hits,
    supervised_mask,
)
from opd.tokens.token_bytes import pack_token_bytes, token_bytes

TABLE = [b"", b"<", b"think", b">", b"<th", b"ink>", b" <", b"a<", b"<think>", b"nk", b"thi", b"<<"]
TEXTS = [
    "<think> Okay, let's see.",
    " 12+34=46\n\n",
    "naïve café 漢字 🙂🙃",
    "a\t b  c",
    "</think>7",
]


def slow_string(tokens: list[int], mask: list[bool], string: bytes, first: bool) -> list[bool]:
    """Return the tokens of one response that overlap the string, compared byte by byte."""
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
    previous_ids: set[int] = set()
    out = []
    for token, keep in zip(tokens, mask, strict=True):
        out.append(keep and token in ids and not (first and token in previous_ids))
        if keep:
            previous_ids.add(token)
    return out


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids of TABLE in ragged responses with holes; the padding id would match the rules."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(TABLE), (7, 23), generator=generator)
    length = torch.randint(0, 24, (7, 1), generator=generator)
    holes = torch.rand(7, 23, generator=generator) < 0.8
    mask = (torch.arange(23) < length) & holes
    return torch.where(torch.arange(23) < length, tokens, 8), mask


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("string", [b"<think>", b"<", b"<<", b"thinkthink", b"k><t", b"<" * 200])
def test_a_string_is_found_however_it_is_split(string: bytes, first: bool) -> None:
    rule = ResolvedMaskRules("s", first, (), (string,), pack_token_bytes(TABLE))
    total = 0
    for seed in range(12):
        tokens, mask = random_batch(seed)
        expected = [
            slow_string(t, m, string, first)
            for t, m in zip(tokens.tolist(), mask.tolist(), strict=True)
        ]
        hits = rule_hits(tokens, mask, rule)
        assert hits.tolist() == expected
        assert supervised_mask(tokens, mask, [rule]).tolist() == (mask & ~hits).tolist()
        total += int(hits.sum())
    assert total > 0 or len(string) == 200, "no batch contains the string"


@pytest.mark.parametrize("first", [False, True])
def test_ids_and_several_rules_equal_a_loop(first: bool) -> None:
    rules = [
        ResolvedMaskRules("i", first, (1, 2, 8), (), pack_token_bytes(TABLE)),
        ResolvedMaskRules("j", True, (2, 5), (), pack_token_bytes(TABLE)),
        ResolvedMaskRules("s", first, (), (b"<think>", b"nk"), pack_token_bytes(TABLE)),
    ]
    for seed in range(12):
        tokens, mask = random_batch(seed)
        for t, m, result in zip(tokens, mask, supervised_mask(tokens, mask, rules), strict=True):
            row, keep = t.tolist(), m.tolist()
            hits_by_rule = [
                slow_ids(row, keep, (1, 2, 8), first),
                slow_ids(row, keep, (2, 5), True),
                slow_string(row, keep, b"<think>", first),
                slow_string(row, keep, b"nk", first),
            ]
            out = [
                k and not any(g) for k, g in zip(keep, zip(*hits_by_rule, strict=True), strict=True)
            ]
            assert result.tolist() == out
        assert supervised_mask(tokens, mask, rules[::-1]).tolist() == (
            supervised_mask(tokens, mask, rules).tolist()
        )


def test_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 3, 9, 4, 5], [4, 5, 1, 2, 3, 8], [0, 1, 2, 0, 3, 1]])
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 5] = False
    rule = ResolvedMaskRules("s", False, (), (b"<think>",), pack_token_bytes(TABLE))
    assert rule_hits(tokens, mask, rule).long().tolist() == [
        [1, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0],
    ]
    assert rule_hits(tokens, mask, replace(rule, first=True)).long().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
    ]
    unknown_ids = torch.where(tokens == 3, 500, tokens)  # a row of a padded head has no bytes
    assert rule_hits(unknown_ids, mask, rule)[0].long().tolist() == [0, 0, 0, 0, 1, 1]
    doubled = ResolvedMaskRules(
        "s", False, (), (b"<<",), pack_token_bytes(TABLE)
    )  # the last row of the table
    assert not rule_hits(torch.full((1, 4), 500), mask[:1, :4], doubled).any()
    assert rule_hits(tokens[:1, :3], mask[:1, :3], rule).all(), (
        "a response may consist of the string only"
    )
    empty = torch.zeros(0, 6, dtype=torch.long)
    assert rule_hits(empty, empty.bool(), rule).shape == (0, 6)
    assert not rule_hits(tokens, torch.zeros_like(mask), rule).any()


def test_the_paper_masks_the_first_of_each_of_three_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    response = [ids(t) for t in ["<", "think", ">", "a", "<", "think", ">", "<|im_end|>"]]
    tokens = torch.tensor([response, [ids("a"), *response[:7]]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    rules = resolve_mask_rules(["paper"], tokenizer, [ids("<|im_end|>")])
    expected = [[0, 0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1, 1]]
    assert supervised_mask(tokens, mask, rules).long().tolist() == expected


def word_tokenizer():
    """Return a tokenizer like Qwen's with a few merged tokens."""
    from transformers import Qwen2Tokenizer

    words = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        *byte_alphabet(),
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
    """Train a byte-level and a SentencePiece-like BPE and wrap them for `transformers`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizers_by_name: dict[str, object] = {"qwen": word_tokenizer(), "lab": make_tokenizer()}
    level = Tokenizer(models.BPE())
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    start = pre_tokenizers.ByteLevel.alphabet()
    level.train_from_iterator(TEXTS * 50, BpeTrainer(vocab_size=330, initial_alphabet=start))
    level.add_tokens([AddedToken("漢é ", normalized=False)])
    tokenizers_by_name["byte level"] = PreTrainedTokenizerFast(tokenizer_object=level)

    sentence = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    sentence.normalizer = normalizers.Replace(" ", "▁")
    sentence.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    lone = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *lone])
    sentence.train_from_iterator(["<think> Okay, see.", " 12+34=46", "a b  c"] * 50, trainer)
    sentence = with_plain_bytes(sentence)
    tokenizers_by_name["sentence piece"] = PreTrainedTokenizerFast(
        tokenizer_object=sentence, eos_token="</s>"
    )
    return tokenizers_by_name


def with_plain_bytes(tokenizer):
    """Make lone bytes ordinary tokens, as in published vocabularies, instead of special ones."""
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
        for i in ids:
            alone = tokenizer.decode([i], clean_up_tokenization_spaces=False)
            assert table[i].decode("utf-8", "replace") == alone
        longest = max(longest, *(len(table[i]) for i in ids))
    assert longest > 1


def test_rules_are_read_and_named() -> None:
    assert parse_rules(["id:7", "string:a:b:first", "token:x:all", "role:eos"]) == (
        MaskRule("id", "7"),
        MaskRule("string", "a:b", "first"),
        MaskRule("token", "x"),
        MaskRule("role", "eos"),
    )
    assert [r.name for r in parse_rules(["paper", "token:<:first"])] == [
        "token:<:first",
        "token:think:first",
        "token:<|im_end|>:first",
    ]
    assert parse_rules(["string::first:all"])[0] == MaskRule("string", ":first")
    for rule in parse_rules(["id:7", "string:a:b:first", "paper"]):
        assert parse_rules([rule.name]) == (rule,)
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
            parse_rules([bad])
        assert repr(bad) in str(error.value)
    with pytest.raises(ValueError, match=r"expected id:NUMBER.*role:think.*paper"):
        parse_rules(["nothing"])


def test_roles_and_tokens_become_ids() -> None:
    tokenizer = make_tokenizer()
    ids = {
        rule.name: rule.ids
        for rule in resolve_mask_rules(
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
    assert resolve_mask_rules(["role:think"], tokenizer, [1])[0].strings == (
        b"<think>",
        b"</think>",
    )
    with pytest.raises(ValueError, match=r"'role:bos'.*remove the rule"):
        resolve_mask_rules(["role:bos"], tokenizer, [1])
    with pytest.raises(ValueError, match=r"'token:think'.*string:TEXT"):
        resolve_mask_rules(["token:think"], tokenizer, [1])
    text = "<think>3<4</think><|im_end|>"
    row = [*tokenizer.encode("<"), *tokenizer.encode("think"), *tokenizer.encode(">"), 3]
    tokens = torch.tensor([row + tokenizer.encode(text)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    supervised = tokens[
        supervised_mask(tokens, mask, resolve_mask_rules(["role:think"], tokenizer, [1]))
    ]
    assert tokenizer.decode(supervised) == "3<4<|im_end|>"
    supervised = tokens[
        supervised_mask(tokens, mask, resolve_mask_rules(["role:think:first"], tokenizer, [1]))
    ]
    assert tokenizer.decode(supervised) == "<think><think>3<4<|im_end|>"


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
    ResolvedMaskRules("id:1", False, (1,), (), pack_token_bytes(TABLE)),
    ResolvedMaskRules("string:nk", False, (), (b"nk",), pack_token_bytes(TABLE)),
]


def test_a_masked_batch_keeps_what_was_sampled_and_says_why() -> None:
    for unmasked_batch in (scored_batch(0), Rollouts(**rollout_fields(scored_batch(0)))):
        batch = apply_mask_rules(unmasked_batch, RULES).validate()
        assert type(batch) is type(unmasked_batch)
        assert batch.mask_rule == "response - id:1 - string:nk"
        assert (
            batch.mask.tolist()
            == supervised_mask(unmasked_batch.tokens, unmasked_batch.mask, RULES).tolist()
        )
        assert 0 < batch.mask.sum() < unmasked_batch.mask.sum()
        assert batch.tokens.tolist() == unmasked_batch.tokens.tolist()
        assert torch.equal(batch.sampled, unmasked_batch.mask)
        assert torch.equal(batch.sampler_logp, unmasked_batch.sampler_logp)
        assert apply_mask_rules(unmasked_batch, []) is unmasked_batch
    unmasked_batch, batch = scored_batch(0), apply_mask_rules(scored_batch(0), RULES)
    unmasked_fields, masked_fields = flatten(unmasked_batch), flatten(batch)
    assert masked_fields.keys() - unmasked_fields.keys() == {"sampled_mask"}
    assert all(
        torch.equal(masked_fields[name], x)
        for name, x in unmasked_fields.items()
        if name not in NOT_NUMBERS
    )
    masked_twice = apply_mask_rules(batch, RULES[:1])
    assert torch.equal(masked_twice.mask, batch.mask), "a masked token stays masked"
    assert torch.equal(masked_twice.sampled, unmasked_batch.mask)


NOT_NUMBERS = ("mask", "reward")


def test_a_rule_reads_what_was_sampled_whatever_is_supervised() -> None:
    """A first occurrence that another rule removed still counts as the first one."""
    first = replace(RULES[0], first=True)
    tokens = torch.tensor([[1, 3, 1, 1]])
    batch = Rollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=-torch.ones(1, 4),
        prompt=torch.tensor([0]),
        ended=torch.tensor([True]),
    )
    assert apply_mask_rules(batch, [first]).mask.tolist() == [[False, True, True, True]]
    narrow = batch.restrict_mask(torch.tensor([[False, True, True, True]]))
    assert apply_mask_rules(narrow, [first]).mask.tolist() == [[False, True, True, True]]


def rollout_fields(batch: ScoredRollouts) -> dict[str, torch.Tensor]:
    names = ("tokens", "mask", "sampler_logp", "prompt", "ended", "reward")
    return {name: getattr(batch, name) for name in names}


def test_the_audit_adds_over_steps_and_equals_a_loop() -> None:
    steps = [scored_batch(0), scored_batch(1)]
    totals = [0.0, 0.0, 0.0]
    removed_totals = {name: [0.0, 0.0, 0.0] for name in ("id:1", "string:nk", "all")}
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
                totals = [a + b for a, b in zip(totals, sizes, strict=True)]
                for name in (name for name in out if out[name][t]):
                    removed_totals[name] = [
                        a + b for a, b in zip(removed_totals[name], sizes, strict=True)
                    ]
    metrics = merge(mask_rule_metrics(steps[0], RULES), mask_rule_metrics(steps[1], RULES))
    for name, sums in removed_totals.items():
        for quantity, part, whole_total in zip(
            ("tokens", "signal", "energy"), sums, totals, strict=True
        ):
            total = metrics[f"mask/{name}/{quantity}"]
            assert 0 < part < whole_total
            assert float(total.total) == pytest.approx(part)
            assert float(total.count) == pytest.approx(whole_total)
    assert len(metrics) == 9
    assert removed_totals["all"][0] < removed_totals["id:1"][0] + removed_totals["string:nk"][0] + 1


def test_a_foreign_end_is_read_as_ones_own() -> None:
    eos_map = EosMap(student=(45, 46), teacher=(43, 46))
    tokens = torch.tensor([[5, 45, 0], [43, 46, 7]])
    assert teacher_tokens(tokens, eos_map).tolist() == [[5, 43, 0], [43, 46, 7]]
    ids = torch.tensor([[[43, 5, 45, 46], [45, 6, 43, 7], [1, 2, 3, 43]]])
    mapped_ids, counts = student_support(ids, eos_map)
    assert mapped_ids.tolist() == [[[45, 5, 45, 46], [45, 6, 45, 7], [1, 2, 3, 45]]]
    assert counts.tolist() == [
        [[True, True, False, True], [True, True, False, True], [True, True, True, True]]
    ]
    shared_eos = EosMap(student=(45, 46), teacher=(46, 45))
    assert torch.equal(teacher_tokens(tokens, shared_eos), tokens)
    assert torch.equal(student_support(ids, shared_eos)[0], ids)


def test_the_ending_is_scored_where_the_teacher_ends(tiny_pair) -> None:
    """A teacher whose EOS has another id scores a response at its own EOS."""
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
        teacher_logp = teacher(ids).logits.log_softmax(-1)[0, 2:5]
        twin_logp = twin(ids).logits.log_softmax(-1)[0, 2:5]
    tokens = torch.tensor(response)
    mapped_ids = teacher_tokens(tokens, EosMap(student=(1,), teacher=(2,)))
    plain = twin_logp.gather(-1, tokens[:, None])[:, 0]
    mapped_logp = twin_logp.gather(-1, mapped_ids[:, None])[:, 0]
    expected = teacher_logp.gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(mapped_logp, expected)
    assert abs(float(plain[-1] - expected[-1])) > 0.1
