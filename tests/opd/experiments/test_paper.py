"""`opd paper`: the settings of every cell match its name."""

from pathlib import Path

import pytest

from opd.cli.train import parse_arguments
from opd.config.settings import Config, with_settings
from opd.data.sources import read_problems
from opd.experiments.matched import CONTROL_METHODS, MATCHED_METHODS, VIEW_METHODS
from opd.experiments.paper import (
    DEFAULT_GROUPS,
    GROUPS,
    LABS,
    METHODS,
    SHARED_SETTINGS,
    TASK_FILES,
    TEACHER,
    PaperOptions,
    cell_arguments,
)
from opd.experiments.pretrained import PRETRAINED_METHODS
from opd.lab.pretrained.pair import TeachingConfig, write_problems
from opd.lab.problem_files import write_held_out_problems
from opd.training.multitask import task_configs
from opd.training.validation import validate


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_settings_of_its_name(method: str) -> None:
    config = parse_arguments(["lab", *SHARED_SETTINGS, *METHODS[method], "--seed", "3"]).settings
    assert validate(config) == []
    assert config.optimizer.updates_per_batch == 2
    assert bool(config.objective.mask) == method.removesuffix("_top_p").endswith("_mask")
    is_top_k = not method.startswith("sampled")
    assert config.objective.objective.startswith(
        ("teacher_topk", "student_topk") if is_top_k else "sampled_"
    )
    samples_full_softmax = method in ("sampled", "sampled_mask", "lsm_whole")
    assert config.rollout.top_p == (
        1.0 if samples_full_softmax else 0.8 if method.endswith("0.8") else 0.9
    )
    assert config.objective.support_k == {"lsm_k2": 2, "lsm_k4": 4}.get(method, 8)
    assert ("v2" in method or "v4" in method) == config.objective.objective.startswith(
        "student_topk"
    )
    assert config.objective.allow_collapse == config.objective.objective.endswith(
        ("unnormalised", "published_tail")
    )


def cell_config(group: str, method: str, root: Path) -> Config:
    if group in TASK_FILES:
        (root / f"{group}.toml").write_text(TASK_FILES[group].format(lab="place"))
    config = parse_arguments(
        [str(x) for x in cell_arguments(group, 3, method, root, Path("place"))]
    ).settings
    assert validate(config) == []
    assert config.out == str(root / group / f"{method}-3")
    assert config.seed == 3
    return config


def test_two_tasks_have_a_teacher_each(tmp_path: Path) -> None:
    config = cell_config("multi", "lsm_mask", tmp_path)
    chain, sort = task_configs(config)
    assert (chain.data.task, chain.teacher, chain.rollout.max_response) == (
        "lab",
        "place/teacher",
        192,
    )
    assert (sort.data.task, sort.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert chain.objective.mask == sort.objective.mask != ()
    assert config.data.task_order == "alternate"
    assert config.steps == 2 * cell_config("single", "lsm_mask", tmp_path).steps
    assert set(GROUPS["multi"]) < set(GROUPS["single"])


@pytest.mark.parametrize("method", [*GROUPS["games"], TEACHER])
def test_games_differ_only_in_the_method(method: str, tmp_path: Path) -> None:
    config = cell_config("games", method, tmp_path)
    assert (config.data.task, config.teacher) == ("env:household", "place/teacher")
    assert config.student == ("place/teacher" if method == TEACHER else "place/student")
    assert (config.steps == 0) == (method == TEACHER)
    assert config.rollout.top_p == (0.9 if method == "lsm" else 1.0)
    assert config.objective.objective == (
        "sampled_token_clipped" if method == "sampled" else "teacher_topk"
    )


def test_agents_have_a_teacher_per_task(tmp_path: Path) -> None:
    config = cell_config("agents", "lsm", tmp_path)
    games, problems = task_configs(config)
    games_only = cell_config("games", "lsm", tmp_path)
    doubled_steps = {
        "steps": 2 * games_only.steps,
        "eval_every": games_only.steps,
        "save_every": games_only.steps,
    }
    assert games == with_settings(games_only, out=config.out, **doubled_steps)
    assert (problems.data.task, problems.teacher) == ("place/sort.jsonl", "place/sort-teacher")
    assert config.data.task_order == "alternate"


def matched_config(group: str, method: str, seed: int, root: Path) -> Config:
    lab = root / "lab"
    lab.mkdir(exist_ok=True)
    write_held_out_problems(lab)
    words = [str(x) for x in cell_arguments(group, seed, method, root, lab)]
    config = parse_arguments(words).settings
    assert validate(config) == []
    assert config.out == str(root / group / f"{method}-{seed}")
    assert config.student == str(lab / ("student" if seed == 0 else f"student-{seed}"))
    assert config.data.task == str(lab / "train.jsonl")
    assert config.evaluation.eval_task == str(lab / "test.jsonl")
    num_responses = config.data.prompts_per_step * config.data.group_size
    assert num_responses == {"views": 48, "controls": 32}[group]
    return config


@pytest.mark.parametrize("method", VIEW_METHODS)
def test_views_differ_in_the_teacher_and_in_what_it_is_shown(method: str, tmp_path: Path) -> None:
    config = matched_config("views", method, 2, tmp_path)
    teacher, shown = method.split("_")
    teachers = {"frozen": config.student, "strong": str(tmp_path / "lab/teacher")}
    assert config.teacher == teachers.get(teacher, "ema")
    if config.teacher == "ema":
        assert config.optimizer.ema_decay == {"moving": 0.9, "live": 0.0}[teacher]
    controls = {"solution": "none", "another": "other_problem", "empty": "empty"}
    assert config.view.view_control == controls[shown]
    assert Path(config.view.teacher_view).read_text() == "{{ prompt }} | {{ solution }}"
    assert config.objective.objective == "full_reverse_kl"


@pytest.mark.parametrize("method", CONTROL_METHODS)
def test_controls_differ_in_responses_loss_and_teacher(method: str, tmp_path: Path) -> None:
    config = matched_config("controls", method, 0, tmp_path)
    has_teacher = method not in ("sft", "reward_only")
    assert config.teacher == (str(tmp_path / "lab/teacher") if has_teacher else "none")
    prefixes = {"sft": "dataset", "offline_kl": "dataset", "mixed": "mixed:0.5"}
    assert config.rollout.prefixes == prefixes.get(method, "student")
    assert config.view.teacher_view == ""
    assert (config.objective.reward_weight > 0) == (method == "reward_only")
    assert (
        config.objective.objective
        == {
            "sft": "negative_log_likelihood",
            "offline_kl": "full_forward_kl",
            "mixed": "full_jsd",
            "reward_only": "reward_only",
            "on_policy_sampled": "sampled_token",
            "on_policy_topk": "teacher_topk",
        }[method]
    )


@pytest.mark.parametrize("method", [*PRETRAINED_METHODS, TEACHER])
def test_the_pretrained_model_is_trained_and_tested_on_different_problems(
    method: str, tmp_path: Path
) -> None:
    lab = tmp_path / "lab"
    write_problems(lab, TeachingConfig())
    words = [str(x) for x in cell_arguments("pretrained", 1, method, tmp_path, lab)]
    config = parse_arguments(words).settings
    assert validate(config) == []
    assert (config.seed, config.out) == (1, str(tmp_path / "pretrained" / f"{method}-1"))
    assert config.student == str(lab / ("teacher" if method == TEACHER else "student"))
    assert config.teacher == str(lab / "teacher")
    assert (config.steps == 0) == (method == TEACHER)
    train, test = (read_problems(x) for x in (config.data.task, config.evaluation.eval_task))
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert len(test) >= config.evaluation.eval_problems >= 150
    assert config.evaluation.eval_temperature == 0
    assert config.rollout.prefixes == "student"
    if method != TEACHER:
        assert config.objective.objective == method.removesuffix("_long")
        assert config.steps == (48 if method.endswith("_long") else 24)


def test_the_pretrained_model_is_trained_only_where_it_is_named() -> None:
    assert set(GROUPS) - set(DEFAULT_GROUPS) == {"pretrained"}
    assert PaperOptions().groups == DEFAULT_GROUPS
    assert set(PaperOptions().labs) == set(LABS.values())
    with pytest.raises(ValueError, match=r"unknown 'pretraind'; known: .*pretrained"):
        PaperOptions(groups=("pretraind",))


def test_there_is_a_student_for_every_seed() -> None:
    PaperOptions(groups=tuple(MATCHED_METHODS), seeds=5)
    PaperOptions(groups=("single",), seeds=9)
    with pytest.raises(ValueError, match="--seeds is 6; views and controls have a student"):
        PaperOptions(groups=("views", "controls"), seeds=6)
