"""Phases, times, machines and remedies of a plan against sums by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest

from diagnostics.errors import InvalidInput
from opd.analysis.plan.known_machines import GPUS, find_machine, with_figures
from opd.analysis.plan.plan import Plan, make_plan
from opd.analysis.plan.remedies import find_remedies
from opd.analysis.plan.report import format_line, format_plan, plan_to_json
from opd.analysis.plan.start import machine_of_device, start_message
from opd.analysis.plan.step_time import link_bytes
from opd.analysis.plan.workload import make_workload
from opd.config.settings import with_settings
from tests.opd.analysis.plan.pairs import MACHINE, saved, settings

GPU = replace(MACHINE, kind="cuda", fixed_reserve=1000.0, fragmentation=0.1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """config.json of a student, and of a teacher with more layers, and nothing else."""
    folder = tmp_path_factory.mktemp("models")
    teacher = saved(folder / "teacher", "qwen2", num_hidden_layers=5)
    return saved(folder / "student", "qwen2"), teacher


def terms(plan: Plan, phase: str) -> dict[str, float]:
    """Bytes of a phase by term."""
    phase_of_name = next(x for x in plan.phases if x.name == phase)
    return {term.name: term.bytes for term in phase_of_name.terms}


def test_weights_and_states_of_every_phase(pair: tuple[str, str]) -> None:
    plan = make_plan(settings(*pair, dtype="bfloat16"), GPU)
    n, m = plan.student.num_weights, plan.teacher.num_weights
    assert m > n
    for phase in ("rollout", "scoring", "optimizer"):
        parts = terms(plan, phase)
        assert parts["student"] == 2 * n
        assert parts["float32 master weights"] == 4 * n
        if phase == "scoring":
            assert "gradients" not in parts, "those of the step before are removed first"
        else:
            assert parts["gradients"] == 4 * n
        assert parts["AdamW moments"] == 8 * n
        assert parts["teacher"] == 2 * m
    assert terms(plan, "optimizer")["temporaries of AdamW"] == pytest.approx(4 * n, rel=0.02), (
        "a GPU updates all weights together"
    )
    float32 = make_plan(settings(*pair), GPU)
    assert "float32 master weights" not in terms(float32, "update")
    assert terms(float32, "scoring")["student"] == 4 * n


def test_the_reserve_is_added_once_to_the_largest_phase(pair: tuple[str, str]) -> None:
    plan = make_plan(settings(*pair), GPU)
    largest = max(sum(terms(plan, phase.name).values()) for phase in plan.phases)
    assert plan.peak_bytes == pytest.approx(1000 + 1.1 * largest)
    assert plan.fits
    assert not replace(plan, machine=replace(GPU, memory=plan.peak_bytes - 1)).fits
    assert plan.step_seconds == sum(x.seconds for x in plan.activities) > 0


def test_an_offloaded_teacher_is_there_while_its_head_is_read(pair: tuple[str, str]) -> None:
    local = make_plan(settings(*pair, offload_teacher=True), GPU)
    assert [x.name for x in local.phases if "teacher" in terms(local, x.name)] == ["scoring"]
    full = settings(*pair, offload_teacher=True, objective="full_reverse_kl")
    planned = make_plan(full, GPU)
    with_teacher = [x.name for x in planned.phases if "teacher" in terms(planned, x.name)]
    assert with_teacher == ["scoring", "update"]
    assert terms(planned, "update")["scored batch"] == pytest.approx(
        terms(local, "update")["scored batch"] + 8 * 32 * 64 * 4
    ), "states of the teacher at every token"


def test_teachers_without_weights_of_their_own(pair: tuple[str, str]) -> None:
    student = pair[0]
    base = make_plan(settings(student, "base", lora_rank=2), GPU)
    assert base.teacher is base.student
    assert "teacher" not in terms(base, "scoring")
    assert terms(base, "optimizer")["gradients"] == 4 * base.student.num_trainable
    server = make_plan(settings(student, "http://host:8000/v1"), GPU)
    assert server.teacher is None
    assert "scoring: teacher" not in [x.name for x in server.activities]
    ema = make_plan(settings(student, "ema", dtype="bfloat16"), GPU)
    assert terms(ema, "scoring")["teacher"] == 4 * ema.student.num_weights
    int8 = make_plan(settings(*pair, teacher_weights="int8"), GPU)
    unsharded = make_plan(settings(*pair), GPU)
    assert terms(int8, "scoring")["teacher"] < 0.6 * terms(unsharded, "scoring")["teacher"]


def test_sharding_divides_states_and_gathers_layers(pair: tuple[str, str]) -> None:
    config = settings(*pair, dtype="bfloat16", sharding="full")
    plan = make_plan(config, GPU, gpus=4)
    n = plan.student.num_weights
    parts = terms(plan, "update")
    assert parts["float32 master weights"] == n
    assert parts["AdamW moments"] == 2 * n
    assert parts["layers that are gathered at once"] < 2 * n
    assert terms(plan, "rollout")["student"] == 2 * n, "whole while it samples"
    workload = make_workload(config, 4, 0, 0)
    assert link_bytes(config, workload, plan.student, 4) == (2 * 2 + 4) * n * 3 / 4
    unsharded = with_settings(config, sharding="none", updates_per_batch=2)
    assert link_bytes(unsharded, workload, plan.student, 4) == 2 * 2 * 4 * n * 3 / 4


def test_sizes_of_a_step() -> None:
    config = settings(
        "",
        "",
        prompts_per_step=6,
        group_size=3,
        max_prompt=20,
        max_response=80,
        max_tokens_per_microbatch=250,
        generation_batch_size=7,
        eval_problems=5,
    )
    workload = make_workload(config, 2, 10, 40)
    assert (workload.rows, workload.rollout_rows, workload.evaluated_rows) == (9, 7, 3)
    assert (workload.micro_rows, workload.longest, workload.prompt) == (2, 80, 10)
    assert workload.num_passes(workload.micro_batch) == pytest.approx(9 * 50 / (2 * 90))
    assert workload.has_several_micro_batches
    updates = make_workload(with_settings(config, updates_per_batch=6), 1, 10, 40)
    assert (updates.rows, updates.micro_rows, updates.update_rows) == (18, 2, 2)
    assert updates.rows_per_update == 3
    own_loss = make_workload(with_settings(config, objective="losses.py:mine"), 1, 10, 40)
    assert (own_loss.update_rows, own_loss.has_several_micro_batches) == (18, False)
    no_answers = with_settings(config, answer_column="")
    assert make_workload(no_answers, 2, 0, 0).evaluated_rows == 0
    with pytest.raises(InvalidInput, match=r"mean_response is 81, expected at most max_response"):
        make_workload(config, 1, 0, 81)
    with pytest.raises(InvalidInput, match=r"gpus is 7, but a step has 6 prompts"):
        make_workload(config, 7, 0, 0)
    with pytest.raises(InvalidInput, match="gpus is 0"):
        make_workload(config, 0, 0, 0)
    games = with_settings(config, task="env:household", layout="trajectory")
    with pytest.raises(InvalidInput, match="layout trajectory"):
        make_workload(games, 1, 0, 0)


def test_time_is_in_proportion_to_work(pair: tuple[str, str]) -> None:
    def seconds(**changes: Any) -> dict[str, float]:
        config = settings(*pair, max_tokens_per_microbatch=192, share_forward_pass=False, **changes)
        machine = replace(MACHINE, seconds_per_operation=0.0)
        return {x.name: x.seconds for x in make_plan(config, machine).activities}

    once, twice = seconds(), seconds(group_size=4)
    for name in ("scoring: student", "scoring: teacher", "update: forward, loss, backward"):
        assert twice[name] == pytest.approx(2 * once[name], rel=0.05)
    assert twice["update: AdamW"] == once["update: AdamW"]
    assert seconds(updates_per_batch=2)["update: AdamW"] == 2 * once["update: AdamW"]
    recomputed_times = seconds(gradient_checkpointing=True)
    extra = (
        recomputed_times["update: forward, loss, backward"]
        - once["update: forward, loss, backward"]
    )
    assert extra == pytest.approx(once["scoring: student"], rel=0.25), "a second forward pass"


@pytest.mark.parametrize("objective", ["teacher_topk", "full_reverse_kl"])
def test_a_shared_pass_saves_a_forward_pass_and_on_the_vocabulary_both_heads(
    pair: tuple[str, str], objective: str
) -> None:
    def plan(**changes: Any) -> Plan:
        return make_plan(settings(*pair, objective=objective, **changes), MACHINE)

    def flops(planned: Plan) -> dict[str, float]:
        return {x.name: x.flops for x in planned.activities}

    shared, separate = plan(), plan(share_forward_pass=False)
    forward = flops(separate).pop("scoring: student")
    heads = flops(separate)["scoring: logits and statistics"]
    saved_flops = forward + (heads if objective == "full_reverse_kl" else 0)
    assert forward > 0
    assert heads > 0
    assert ("update: logits and statistics" in flops(shared)) == (objective == "full_reverse_kl")
    assert sum(flops(separate).values()) - sum(flops(shared).values()) == saved_flops
    assert shared.step_seconds < separate.step_seconds
    memory = "hidden states and logits of a micro-batch"
    if objective == "teacher_topk":
        assert terms(shared, "scoring")[memory] > terms(separate, "scoring")[memory], "activations"
    for changes in ({"updates_per_batch": 2}, {"offload_teacher": True}):
        assert "scoring: student" in flops(plan(**changes))
    sharded = settings(*pair, objective=objective, sharding="full")
    assert "scoring: student" in flops(make_plan(sharded, MACHINE, gpus=2))


def test_remedies_are_planned_again_until_the_run_fits(pair: tuple[str, str]) -> None:
    config = settings(*pair, objective="full_reverse_kl", prompts_per_step=16)

    def replan(new_config: Any) -> Plan:
        return make_plan(new_config, machine)

    machine = GPU
    plan = replan(config)
    machine = replace(GPU, memory=0.8 * plan.peak_bytes)
    plan = replan(config)
    remedies = find_remedies(plan, replan)
    peaks = [plan.peak_bytes, *(remedy.plan.peak_bytes for remedy in remedies)]
    assert peaks == sorted(peaks, reverse=True)
    assert remedies[-1].plan.fits
    assert not any(remedy.plan.fits for remedy in remedies[:-1])
    new_config = config
    for remedy in remedies:
        new_config = with_settings(new_config, **remedy.settings)
    assert remedies[-1].plan.config == new_config
    text = format_plan(plan, remedies)
    assert "does not fit" in text
    assert f"{remedies[-1].plan.peak_bytes / 1e9:.3g} GB" in text
    data = json.loads(plan_to_json(plan, remedies))
    assert data["peak"] == plan.peak_bytes
    assert sum(data["phases"][data["peak_phase"]].values()) + data["reserve"] == data["peak"]
    assert data["remedies"][-1]["fits"]
    assert f"{plan.peak_bytes / 1e9:.3g} GB" in format_line(plan)
    machine = replace(GPU, memory=1.0)
    hopeless = find_remedies(replan(config), replan, most=3)
    assert "still too large" in format_plan(replan(config), hopeless)


def test_machines_by_name_and_by_figures() -> None:
    assert find_machine("h100") is GPUS["H100"]
    with pytest.raises(InvalidInput, match=r"unknown GPU 'H1000'; known: B200, .*4090.*cpu"):
        find_machine("H1000")
    machine = with_figures(None, 96.0, 1000.0, 4000.0)
    assert (machine.memory, machine.half_flops, machine.bandwidth) == (96e9, 1e15, 4e12)
    larger = with_figures(GPUS["H100"], 94.0, 0.0, 0.0)
    assert larger == replace(GPUS["H100"], memory=94e9)
    with pytest.raises(InvalidInput, match=r"--gpu-flops, --gpu-bandwidth must be set"):
        with_figures(None, 96.0, 0.0, 0.0)
    with pytest.raises(InvalidInput, match="gpu_memory is -1"):
        with_figures(GPUS["H100"], -1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_devices_are_recognised_by_their_names(device: str, expected: str) -> None:
    assert machine_of_device(device, 7e9) == replace(GPUS[expected], memory=7e9)


def test_an_unknown_device_is_named() -> None:
    machine = machine_of_device("NVIDIA L40", 48e9)
    assert "NVIDIA L40 (unknown" in machine.name
    assert machine.memory == 48e9


def test_a_run_that_does_not_fit_is_warned_of_at_its_start(pair: tuple[str, str]) -> None:
    plan = make_plan(settings(*pair), GPU)
    assert "WARNING" not in start_message(plan, plan.peak_bytes)
    assert "WARNING" in start_message(plan, plan.peak_bytes - 1)
    assert f"{plan.peak_bytes / 1e9:.3g} GB" in start_message(plan, 0)


def test_rates_of_this_cpu_are_those_of_a_product_and_a_copy() -> None:
    machine = find_machine("cpu")
    assert 1e8 < machine.float32_flops < 1e14
    assert 1e8 < machine.elementwise_bandwidth <= 4 * machine.bandwidth < 1e13
    assert 1e-7 < machine.seconds_per_operation < 1e-2
    assert machine.seconds_per_token >= 0
    assert 0 <= machine.seconds_per_backward_operation < 1e-2
    seconds = machine.work_seconds(machine.float32_flops, 0.0, 4, False)
    assert seconds == pytest.approx(1), "a second of products"
