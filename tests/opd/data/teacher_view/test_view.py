"""Teacher prompts from a template: their text, their controls, and what is refused."""

from collections import Counter
from typing import Any

import pytest
import torch

from diagnostics.errors import InvalidInput, MissingFile
from opd.data.chain_task import Problem
from opd.data.chat_template import ChatFormat
from opd.data.prompts import encode_prompts
from opd.data.sources import Columns, DatasetProblem, parse_problems
from opd.data.teacher_view.controls import ViewControl, other_problem, pair_problems
from opd.data.teacher_view.template import compile_view_template, load_view_template
from opd.data.teacher_view.values import Attempt
from opd.data.teacher_view.view import TeacherView, teacher_problem, with_teacher_prompts
from opd.lab.build import make_tokenizer

SOLVED = Problem("1+1", "2", "1 and 1 are 2")


def make_view(text: str, **fields: Any) -> TeacherView:
    return TeacherView(template=compile_view_template(text, "view.jinja"), **fields)


def view_text(text: str, problem: Problem = SOLVED, **fields: Any) -> str:
    attempt = Attempt("I say 3", 0.0, "The answer 3 is wrong.")
    peers = [Attempt("2!", 1.0, "The answer 2 is correct."), Attempt("4")]
    return teacher_problem(make_view(text, **fields), problem, attempt, peers).prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ prompt }} Hint: {{ solution }}", "1+1 Hint: 1 and 1 are 2"),
        ("{{ answer }}\n", "2"),
        ("{{ messages[0].role }}", "user"),
        ("{{ response }}|{{ reward }}|{{ feedback }}", "I say 3|0.0|The answer 3 is wrong."),
        ("{% for p in peers %}{{ p.response }};{% endfor %}", "2!;4;"),
        ("{{ peers | selectattr('reward', 'defined') | list | length }}", "1"),
        ("{% if hint is defined %}{{ hint }}{% else %}none{% endif %}", "none"),
    ],
)
def test_a_template_shows_the_values_of_its_problem_and_response(text: str, expected: str) -> None:
    assert view_text(text) == expected


def test_columns_of_a_row_and_worked_solutions_are_shown() -> None:
    rows = [
        {"question": f"{i}+1", "answer": f"{i} and 1\n#### {i + 1}", "meta": {"hint": f"h{i}"}}
        for i in range(3)
    ]
    columns = Columns(prompt="question", kept=("question", "meta"))
    problems = parse_problems(rows, "rows", columns, "Be brief.", ())
    text = "{{ question }}|{{ meta.hint }}|{{ answer }}|{{ solution }}|{{ messages | length }}"
    assert view_text(text, problems[1]) == "1+1|h1|2|1 and 1\n#### 2|2"
    with pytest.raises(InvalidInput, match=r"rows 0, 1, 2 lacks \['hint'\].*has \['answer', 'meta"):
        parse_problems(rows, "rows", Columns(prompt="question", kept=("hint",)), "", ())


def test_a_column_with_the_name_of_a_function_of_jinja_is_shown() -> None:
    template = compile_view_template("{{ range }}{% for i in dict(a=1) %}{{ i }}{% endfor %}", "v")
    assert template.columns == ()
    assert template.function_names == {"range"}
    rows = [{"prompt": f"{i}+1", "answer": "1", "range": f"up to {i}"} for i in range(2)]
    columns = Columns(kept_where_present=tuple(sorted(template.function_names)))
    problems = parse_problems(rows, "rows", columns, "", ())
    assert teacher_problem(TeacherView(template=template), problems[1]).prompt == "up to 1a"


def test_another_problems_value_is_shown_where_a_row_lacks_its_own() -> None:
    problems = [Problem(f"{i}+1", str(i + 1), f"s{i}" if i < 2 else "") for i in range(5)]
    control = ViewControl(kind="other_problem", successors=pair_problems(problems, 0))
    text = "{% if solution is defined %}{{ solution }}{% else %}none{% endif %}"
    shown = Counter(view_of_problem(text, x, control) for x in problems)
    assert shown == {"s0": 1, "s1": 1, "none": 3}, "as without the control"


def view_of_problem(text: str, problem: Problem, control: ViewControl) -> str:
    return teacher_problem(make_view(text, control=control), problem).prompt


def test_system_message_thinking_and_chat_template_are_the_teachers() -> None:
    template = (
        "{{ eos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if enable_thinking %}<think>{% endif %}"
    )
    view = make_view(
        "{{ prompt }}?",
        system="Know all.",
        thinking=True,
        chat_format=ChatFormat(template, (("eos_token", "E"),)),
    )
    tokenizer = make_tokenizer()
    chats = [(("system", "Be brief."), ("user", "1+1")), ()]
    problems = [DatasetProblem("1+1", "2", chat=chat) for chat in chats]
    prompts = encode_prompts(tokenizer, problems, 2, 100)
    viewed = with_teacher_prompts(
        view, tokenizer, prompts, [problems[i // 2] for i in range(4)], None
    )
    assert torch.equal(viewed.tokens, prompts.tokens)
    assert [
        tokenizer.decode(ids[mask])
        for ids, mask in zip(
            viewed.teacher_prompts.tokens, viewed.teacher_prompts.mask, strict=True
        )
    ] == ["E[system]Know all.[user]1+1?<think>"] * 4


def test_each_row_reads_its_own_response_and_those_of_its_prompt() -> None:
    tokenizer, problems = make_tokenizer(), [Problem("a", "1"), Problem("b", "2")]
    prompts = encode_prompts(tokenizer, problems, 3, 100)
    attempts = [Attempt(f"r{i}", float(i), f"f{i}") for i in range(6)]
    view = make_view(
        "{{ prompt }}{{ feedback }}{% for p in peers %}-{{ p.response }}{% endfor %}",
        chat_format=ChatFormat("{{ messages[0].content }}"),
    )
    row_problems = [problems[i // 3] for i in range(6)]
    viewed = with_teacher_prompts(view, tokenizer, prompts, row_problems, attempts).teacher_prompts
    assert [
        tokenizer.decode(ids[mask]) for ids, mask in zip(viewed.tokens, viewed.mask, strict=True)
    ] == ["af0-r1-r2", "af1-r0-r2", "af2-r0-r1", "bf3-r4-r5", "bf4-r3-r5", "bf5-r3-r4"]
    with pytest.raises(InvalidInput, match=r"uses responses .* but there is none yet"):
        with_teacher_prompts(view, tokenizer, prompts, row_problems, None)


def test_another_problem_is_a_derangement_that_depends_on_the_seed_alone() -> None:
    problems = [Problem(f"p{i % 7}", f"{i}", f"s{i}") for i in range(14)]  # each prompt twice
    successors = pair_problems(problems, seed=3)
    prompts = {problem.prompt for problem in problems}
    assigned = {
        p: other_problem(ViewControl(successors=successors), Problem(p, "")).prompt for p in prompts
    }
    assert all(problem != other for problem, other in assigned.items())
    assert Counter(assigned.values()) == dict.fromkeys(prompts, 1)
    first_of_each = problems[:7]
    assert pair_problems(first_of_each[::-1], seed=3) == pair_problems(first_of_each, seed=3)
    assert any(pair_problems(problems, seed=seed) != successors for seed in range(4, 8))
    held_out = Problem("new", "1", "own")
    assert other_problem(ViewControl(successors=successors), held_out) in problems
    with pytest.raises(InvalidInput, match="the data have 1 different prompts"):
        pair_problems(problems[::7], seed=0)


def test_controls_change_what_is_shown_and_not_what_is_asked() -> None:
    other = Problem("2+2", "4", "2 and 2 are 4")
    successors = pair_problems([SOLVED, other], seed=0)
    text = "{{ prompt }}|{{ answer }}|{{ solution }}"
    shown = {
        kind: view_text(text, control=ViewControl(kind=kind, successors=successors))
        for kind in ("none", "other_problem", "empty")
    }
    assert shown == {
        "none": "1+1|2|1 and 1 are 2",
        "other_problem": "1+1|4|2 and 2 are 4",
        "empty": "1+1||",
    }
    shuffled = [
        view_text(text, control=ViewControl(kind="shuffled", seed=seed)) for seed in range(6)
    ]
    assert len(set(shuffled)) > 1
    for line in shuffled:
        prompt, answer, solution = line.split("|")
        assert (prompt, answer) == ("1+1", "2")
        assert sorted(solution.split()) == sorted(["1", "and", "1", "are", "2"])
    again = view_text(text, control=ViewControl(kind="shuffled", seed=5))
    assert again == shuffled[5]
    attempts = view_text(
        "{{ feedback }}|{{ peers | length }}|{{ reward }}.", control=ViewControl(kind="empty")
    )
    assert attempts == "|0|."


def test_another_problem_without_a_solution_does_not_show_ones_own() -> None:
    successors = pair_problems([SOLVED, Problem("2+2", "4")], seed=0)
    with pytest.raises(InvalidInput, match="'solution' is undefined"):
        view_text(
            "{{ solution }}", control=ViewControl(kind="other_problem", successors=successors)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "teacher_view view.jinja is empty"),
        ("a\n{{ prompt", "view.jinja, line 2: .*correct the template"),
        ("{{ hint }}", "'hint' is undefined; here it may use answer, feedback, messages, peers"),
        ("{{ prompt.hint }}", "has no attribute 'hint'"),
        ("{% if reward > 0 %}{{ answer }}{% endif %} ", "view.jinja renders to nothing"),
        ("{{ prompt.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'other' %}", "view.jinja fails with TypeError: no loader"),
        ("{{ 1 // (prompt | length - 3) }}", "fails with ZeroDivisionError"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        view_text(text)


def test_a_file_that_does_not_exist_is_named() -> None:
    with pytest.raises(MissingFile, match=r"teacher_view no\.jinja does not exist"):
        load_view_template("no.jinja")


def test_long_prompts_and_refused_roles_name_the_row_and_the_settings() -> None:
    tokenizer = make_tokenizer()
    problem = DatasetProblem("1+1", "2", row=7)
    prompts = encode_prompts(tokenizer, [problem], 1, 100)
    with pytest.raises(InvalidInput, match=r"prompt of row 7 has \d+ tokens, but .* allows 20"):
        with_teacher_prompts(
            make_view("{{ prompt }}", max_tokens=20), tokenizer, prompts, [problem], None
        )
    refusing = ChatFormat("{{ raise_exception('no ' ~ messages[0].role) }}")
    view = TeacherView(system="Know all.", chat_format=refusing)
    with pytest.raises(InvalidInput, match=r"row 7 cannot be encoded: .*no system.*teacher_system"):
        with_teacher_prompts(view, tokenizer, prompts, [problem], None)
