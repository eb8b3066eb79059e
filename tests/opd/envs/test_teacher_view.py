"""Games whose teacher reads more than the student: texts by hand, scores turn by turn, runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput
from diagnostics.records.batch_files import load_batch
from opd.data.teacher_view.controls import ViewControl
from opd.data.teacher_view.template import compile_view_template
from opd.data.teacher_view.view import TeacherView
from opd.envs.packing import pack_rows
from opd.envs.task import GameTask
from opd.envs.teacher_view import with_game_views
from opd.lab.build import make_tokenizer
from opd.teachers.pair import load_pair
from opd.training.train import train
from tests.helpers.games import ECHO, Echo, Script, play_games
from tests.helpers.runs import rows, settings

STATE = (
    "{{ goal }};{{ observation }};"
    "{% for turn in turns %}{{ turn.observation }}>{{ turn.action }} {% endfor %};{{ prompt }}"
)
GRADED = "{{ response }};{{ feedback }};{% for peer in peers %}{{ peer.response }}{% endfor %}"


def say(row: int, call: int) -> str:
    """Say a letter per game and call; the last answer of an even row has an odd length."""
    return "ab"[row % 2] * (1 + call + row % 2)


def view_texts(text: str, layout: str, **control: Any) -> list[str]:
    games = GameTask(source="", make=Echo, layout=layout, history=1)
    episodes = play_games(Script(say), games, [4], 2)  # two episodes of one game of three turns
    prompts, _ = pack_rows(episodes, layout, temperature=1.0, top_p=1.0)
    tokenizer = make_tokenizer()
    view = TeacherView(
        template=compile_view_template(text, "view.jinja"), control=ViewControl(**control)
    )
    eos = [tokenizer.eos_token_id]
    viewed = with_game_views(view, tokenizer, eos, games, episodes, prompts)
    assert torch.equal(viewed.tokens, prompts.tokens)
    pairs = zip(viewed.teacher_prompts.tokens, viewed.teacher_prompts.mask, strict=True)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in pairs]
    opening, ending = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert all(x.startswith(opening) and x.endswith(ending) for x in texts)
    return [x.removeprefix(opening).removesuffix(ending) for x in texts]


def test_each_turn_is_seen_with_its_own_past() -> None:
    first = "3 words;Say it.;;Task: 3 words\nSay it."
    assert view_texts(STATE, "turns") == [
        first,
        "3 words;1!;Say it.>a ;Task: 3 words\n1. Say it.\n> a\n1!",
        "3 words;2!;Say it.>a 1!>aa ;Task: 3 words\n2. 1!\n> aa\n2!",
        first,
        "3 words;2!;Say it.>bb ;Task: 3 words\n1. Say it.\n> bb\n2!",
        "3 words;3!;Say it.>bb 2!>bbb ;Task: 3 words\n2. 2!\n> bbb\n3!",
    ]
    assert view_texts(STATE, "trajectory") == [first, first]
    assert view_texts(STATE, "turns", kind="empty")[1] == (
        "3 words;1!;;Task: 3 words\n1. Say it.\n> a\n1!"
    )


def test_each_turn_is_seen_with_its_response_and_the_other_episode() -> None:
    transcripts = [
        "1. Say it.\n> a\n2. 1!\n> aa\n3. 2!\n> aaa",
        "1. Say it.\n> bb\n2. 2!\n> bbb\n3. 3!\n> bbbb",
    ]
    won, lost = "The game was won in 3 turns.", "The game was lost after 3 turns."
    assert view_texts(GRADED, "turns") == [
        *(f"{answer};{won};{transcripts[1]}" for answer in ("a", "aa", "aaa")),
        *(f"{answer};{lost};{transcripts[0]}" for answer in ("bb", "bbb", "bbbb")),
    ]
    assert view_texts(GRADED, "trajectory") == [
        f"{transcripts[0]};{won};{transcripts[1]}",
        f"{transcripts[1]};{lost};{transcripts[0]}",
    ]


def game_options(layout: str, **changes: Any) -> dict[str, Any]:
    options = {"task": ECHO, "layout": layout, "max_prompt": 200, "max_response": 6, "steps": 2}
    return {**options, "eval_problems": 1, "eval_every": 0, "objective": "sampled_token", **changes}


@pytest.mark.parametrize("layout", ["turns", "trajectory"])
def test_a_view_that_is_the_prompt_changes_no_bit(tiny_pair, tmp_path: Path, layout: str) -> None:
    (tmp_path / "view.jinja").write_text("{{ prompt }}")
    plain, viewed = (
        train(settings(tiny_pair, tmp_path / name, **game_options(layout, **changes))).folder
        for name, changes in (
            ("plain", {}),
            ("viewed", {"teacher_view": str(tmp_path / "view.jinja")}),
        )
    )
    viewed_rows = [
        {name: x for name, x in row.items() if not name.startswith("view/")} for row in rows(viewed)
    ]
    assert viewed_rows == rows(plain)
    weights = [(x / "final" / "model.safetensors").read_bytes() for x in (plain, viewed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("layout", ["turns", "trajectory"])
def test_scores_of_a_run_are_those_of_plain_scoring_with_two_prompts(
    tiny_pair, tmp_path: Path, layout: str
) -> None:
    (tmp_path / "view.jinja").write_text("You see {{ observation }} {{ feedback }}")
    options = game_options(layout, teacher_view=str(tmp_path / "view.jinja"), steps=1)
    file = (
        train(settings(tiny_pair, tmp_path / "run", **options)).folder / "batches" / "step_000000"
    )
    batch = load_batch(file.with_suffix(".safetensors"))
    texts, shown_texts = (
        json.loads(file.with_suffix(suffix).read_text())
        for suffix in (".prompts.json", ".teacher_prompts.json")
    )
    assert all("You see" in text and " turns." in text for text in shown_texts)
    pair, tokenizer = load_pair(*map(str, tiny_pair), "cpu", "float32"), make_tokenizer()
    for row in range(len(batch)):
        length = int(batch.mask[row].nonzero()[-1]) + 1
        response, sampled = batch.tokens[row, :length], batch.mask[row, :length]
        for model, text, actual in (
            (pair.student, texts[row], batch.student_logp),
            (pair.teacher.model, shown_texts[row], batch.teacher_logp),
        ):
            ids = tokenizer.encode(text, add_special_tokens=False)
            with torch.no_grad():
                logits = model.network(torch.tensor([ids + response.tolist()])).logits[0]
            logp = logits[len(ids) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]
            torch.testing.assert_close(
                actual[row, :length][sampled], logp[sampled], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize(
    ("view", "changes", "message"),
    [
        ("{{ solution }}", {}, "uses solution, which a game does not have; it may use feedback"),
        ("{{ turns[0].action }}", {}, "fails: list object has no element 0; here it may use goal"),
        ("{{ feedback }}", {"view_control": "other_problem"}, "games have no answers or solutions"),
        ("{{ prompt }}", {"teacher": "ema"}, "reads the same prompts, so the divergence is zero"),
        ("{{ prompt }}", {"max_teacher_prompt": 9}, r"has \d+ tokens, but .* allows 9"),
    ],
)
def test_a_view_that_cannot_be_used_is_refused(
    tiny_pair, tmp_path: Path, view: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "view.jinja").write_text(view)
    options = game_options("turns", teacher_view=str(tmp_path / "view.jinja"), **changes)
    with pytest.raises(InvalidInput, match=message):
        train(settings(tiny_pair, tmp_path / "run", **options))
