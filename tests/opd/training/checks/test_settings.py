"""Settings without effect are refused by name before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest

from opd.config.settings import Config, TaskSettings, with_settings
from opd.training.checks.settings import CONDITIONS, unused_settings
from opd.training.train import train

GAMES = {"task": "env:household"}
OUTCOME: dict[str, Any] = {"reward_weight": 1.0, "teacher": "ema"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"objective": name, "support_k": 1}, "support_k is 1: renormalised over one id")
        for name in ("teacher_topk", "student_topk", "intersection_topk")
    ),
    ({"objective": "teacher_topk", "support_k": 1, "reward_weight": 1.0}, "support_k is 1"),
    (
        {"objective": "sampled_token", "baseline": "position_mean", "prompts_per_step": 1},
        "position_mean is the mean over the other prompts of the step, but a step has 1",
    ),
    (
        {"objective": "sampled_token", "baseline": "leave_one_out", "group_size": 1},
        "mean over the other responses to the prompt, but group_size is 1",
    ),
    (
        {"objective": "sampled_token", "reward_weight": 1.0, "group_size": 1},
        "reward_weight 1.0 compares",
    ),
    ({"objective": "sampled_token", "baseline": "given"}, "baseline given is a column"),
    *(
        ({"objective": name, "map_eos": True}, f"map_eos would not change the loss of {name}")
        for name in ("full_reverse_kl", "full_forward_kl", "full_jsd")
    ),
    ({"objective": "full_reverse_kl", "gamma": 0.5, "map_eos": True}, "map_eos would not change"),
    ({"objective": "student_topk_sampled_tail", "map_eos": True}, "map_eos maps EOS ids"),
    ({**OUTCOME, "map_eos": True}, "map_eos: teacher ema has the student's EOS"),
    (
        {"objective": "sampled_token_clipped", "ppo_clip": (0.1, 0.2, 3.0)},
        "ppo_clip is .* and updates_per_batch is 1",
    ),
    ({"objective": "sampled_token", "ratio": "token"}, "ratio is token, .* 1 up to rounding"),
    ({"view_control": "empty"}, "view_control is 'empty', .* only if teacher_view is set"),
    ({"max_teacher_prompt": 9}, "max_teacher_prompt is 9, .* only if the teacher has prompts"),
    ({"view_metrics_every": 9}, "view_metrics_every is 9, .* only if the teacher has prompts"),
    ({"ema_resync_every": 9}, "ema_resync_every is 9, .* only if the teacher is .ema."),
    ({"ratio": "sequence"}, "ratio is sequence, .* 1 up to rounding"),
    ({"prompt_column": "question"}, "prompt_column is 'question'.*with columns"),
    ({"task": "gsm8k:x.jsonl", "answer_column": "a"}, "answer_column is 'a'"),
    ({**GAMES, "prompt_column": "question"}, "prompt_column"),
    ({"skip_long_prompts": True}, "skip_long_prompts is True"),
    ({"task": "x.jsonl", "eval_prompt_column": "q"}, "eval_prompt_column is 'q'"),
    ({"eval_answer_column": "q"}, "eval_answer_column is 'q'"),
    ({"layout": "trajectory"}, "layout is 'trajectory'.*task is a game"),
    ({"max_turns": 3}, "max_turns is 3.*task is a game"),
    ({"history_turns": 4}, "history_turns is 4.*task is a game"),
    ({**GAMES, "layout": "trajectory", "history_turns": 4}, "history_turns is 4.*layout turns"),
    ({"task_order": "mixed"}, "task_order is 'mixed'.*several tasks"),
    ({"weights_folder": "w"}, "weights_folder is 'w'.*engine is servers"),
    ({"rollout_timeout": 3.0}, "rollout_timeout is 3.0.*engine is servers"),
    ({"rollout_concurrency": 3}, "rollout_concurrency is 3.*engine is servers"),
    ({"engine": "vllm", "generation_batch_size": 3}, "generation_batch_size is 3.*engine is hf"),
    ({"teacher_timeout": 3.0}, "teacher_timeout is 3.0.*on a server"),
    ({"teacher_concurrency": 3}, "teacher_concurrency is 3.*on a server"),
    ({"teacher_eos": (3,), "map_eos": True}, r"teacher_eos is \(3,\).*on a server and map_eos"),
    ({**OUTCOME, "teacher": "base", "lora_rank": 2, "offload_teacher": True}, "offload_teacher"),
    ({"teacher": "http://h:1/v1", "offload_teacher": True}, "offload_teacher is True"),
    ({"ema_decay": 0.5}, "ema_decay is 0.5"),
    ({"lora_alpha": 8.0}, "lora_alpha is 8.0.*lora_rank"),
    ({"schedule": "cosine", "warmup": 4, "steps": 4}, "schedule is 'cosine'.*warm-up ends"),
    ({"eval_temperature": 0.0, "eval_top_p": 0.5}, "eval_top_p is 0.5.*eval_temperature"),
    ({"eval_temperature": 0.0, "eval_samples": 3}, "eval_samples is 3.*eval_temperature"),
    ({"logger_columns": "all"}, "logger_columns is 'all'.*loggers are named"),
    (
        {"tasks": (TaskSettings(name="a", task="lab", weight=2.0),)},
        "task 'a': weight is 2.0.*alternate",
    ),
    (
        {
            "tasks": (
                TaskSettings(name="a", task="lab", max_turns=3),
                TaskSettings(name="b", task="env:household"),
            )
        },
        "task 'a': max_turns is 3",
    ),
    ({"response_column": "text"}, "response_column is 'text'.*only if prefixes is dataset"),
]


def make_config(**changes: Any) -> Config:
    """A config with models and files that do not exist, so that nothing can be loaded."""
    return with_settings(
        Config(student="", teacher="", out=""),
        **({"student": "absent", "teacher": "absent-too", "out": "absent"} | changes),
    )


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_a_setting_without_effect_is_refused_by_name(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        train(make_config(out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


EFFECTIVE: list[dict[str, Any]] = [
    {},
    {"task": "x.jsonl", "prompt_column": "q", "answer_column": "a", "skip_long_prompts": True},
    {"task": "x.jsonl", "prefixes": "mixed:0.5:dataset", "response_column": "text"},
    {"task": "lab", "eval_task": "x.jsonl", "eval_prompt_column": "q", "eval_answer_column": "a"},
    {**GAMES, "layout": "turns", "max_turns": 3, "history_turns": 4},
    {"engine": "servers", "rollout_servers": ("http://h:1/v1",), "rollout_concurrency": 3},
    {"generation_batch_size": 3, "lora_rank": 2, "lora_alpha": 8.0},
    {"teacher": "http://h:1/v1", "teacher_concurrency": 3, "teacher_timeout": 3.0},
    {"teacher": "ema", "ema_decay": 0.5, "ema_resync_every": 3, "offload_teacher": True},
    {"teacher_view": "v.jinja", "view_control": "empty", "max_teacher_prompt": 9},
    {"teacher_thinking": "on", "view_metrics_every": 0},
    {"teacher_system": "Know all.", "max_teacher_prompt": 9},
    {"schedule": "cosine", "warmup": 3, "steps": 4},
    {"eval_temperature": 0.5, "eval_top_p": 0.5, "eval_samples": 3},
    {"loggers": ("wandb",), "logger_columns": "all"},
    {
        "tasks": (
            TaskSettings(name="a", task="lab", weight=2.0),
            TaskSettings(name="b", task="env:household", max_turns=3),
        ),
        "task_order": "weighted",
        "layout": "trajectory",
    },
]


@pytest.mark.parametrize("changes", EFFECTIVE)
def test_a_setting_with_an_effect_passes(changes: dict[str, Any]) -> None:
    assert not list(unused_settings(make_config(**changes)))


def test_every_dependent_setting_is_refused_somewhere() -> None:
    refused_names = {name for changes, _ in REFUSED for name in changes}
    assert refused_names >= CONDITIONS.keys() - {"schedule"}
