"""Ids that the student chose, scored by a real vLLM: with either model runner, on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.batch import Rollouts
from opd.data.chain_task import Problem
from opd.data.prompts import Prompts, encode_prompts
from opd.rollouts.hf_engine import sample
from opd.scoring.score import score_batch
from opd.teachers.client import TeacherClient
from opd.teachers.connection import connect
from opd.teachers.pair import ModelPair, load_pair
from opd.teachers.server_kinds import VLLM
from opd.teachers.teacher import ServerTeacher
from opd.tokens.eos import EosMap
from opd.training.train import train
from tests.helpers.processes.vllm_process import free_port, run_vllm_server, wide_pair
from tests.helpers.requests import full_request
from tests.helpers.runs import rows, settings
from tests.opd.teachers.test_client import loss_and_gradients
from tests.opd.teachers.test_client_training import SHORT, assert_close_rows, remote_config

pytestmark = pytest.mark.vllm
K = 16
LIMIT = 128
SIZES = {"max_tokens_per_microbatch": 200, "max_logits_per_chunk": 1 << 16}
TOLERANCE = 1e-4
"""Nats: the largest difference that was seen is 6e-6."""
Case = tuple[ModelPair, Prompts, Rollouts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models with head sizes that vLLM supports on a CPU."""
    return wide_pair(tmp_path_factory.mktemp("pair"), tied=False)


@pytest.fixture(scope="module")
def case(folders: tuple[Path, Path]) -> Case:
    models = load_pair(*map(str, folders), "cpu", "float32")
    prompts = encode_prompts(models.tokenizer, [Problem("1+2" * n, "3") for n in (1, 3)], 2, 64)
    batch = sample(
        models.student,
        prompts,
        models.eos,
        max_response=16,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    return models, prompts, batch


def connect_to(url: str, models: ModelPair, **changes: Any) -> TeacherClient:
    options = {"k": K, "timeout": 600.0, "concurrency": 4, "num_chosen": K} | changes
    return connect(url, models.tokenizer, models.student.vocabulary, **options)


def assert_remote_matches_local(client: TeacherClient, case: Case) -> None:
    models, prompts, batch = case
    ends = models.teacher.eos
    assert ends is not None
    eos_map = EosMap((int(batch.tokens[batch.mask].mode().values),), (ends[0],))
    for source, options in (
        ("student", {}),
        ("union", {}),
        ("teacher", {"map_eos": True, "eos_map": eos_map}),
    ):
        request = full_request(K, source, **(SIZES | options))
        remote, local = (
            score_batch(models.student, teacher, prompts, batch, request).scored
            for teacher in (ServerTeacher("vllm", client), models.teacher)
        )
        assert torch.equal(remote.support.ids, local.support.ids)
        for actual, expected in (
            (remote.teacher_logp, local.teacher_logp),
            (remote.support.teacher_logp, local.support.teacher_logp),
            (remote.support.student_logp, local.support.student_logp),
        ):
            gap = float((actual - expected).abs().max())
            print(f"{source}: largest difference of log-probabilities: {gap:.1e}")
            assert gap < TOLERANCE
        if source != "teacher":
            assert_same_gradients(models, prompts, f"{source}_topk", remote, local)


def assert_same_gradients(
    models: ModelPair, prompts: Prompts, name: str, remote: Any, local: Any
) -> None:
    actual, expected = (
        loss_and_gradients(models, name, prompts, scored, support_k=K) for scored in (remote, local)
    )
    size = max(float(g.abs().max()) for g in expected[1:])
    gap = max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))
    print(f"{name}: largest difference of gradients {gap:.1e}, largest gradient {size:.1e}")
    assert gap < TOLERANCE * size


def test_the_model_runner_v1_refuses_and_whole_distributions_take_its_place(
    folders: tuple[Path, Path], case: Case, tmp_path: Path
) -> None:
    models = case[0]
    options = ("--max-logprobs", "-1", "--enable-scale-out")
    with run_vllm_server(folders[1], free_port(), tmp_path / "vllm.log", LIMIT, *options) as url:
        client = connect_to(url, models)
        generate, whole = VLLM.chosen_routes
        assert client.chosen_route == whole
        query, _ = client.chosen_probe
        with pytest.raises(ValueError, match="requires the V2 model runner"):
            client.send(generate, [query], "the probe")
        assert_remote_matches_local(client, case)


def test_the_model_runner_v2_scores_chosen_ids(
    folders: tuple[Path, Path], case: Case, tmp_path: Path
) -> None:
    models = case[0]
    changes = SHORT | {"objective": "union_topk"}
    local = train(settings(folders, tmp_path / "local", **changes)).folder
    options = ("--max-logprobs", str(K + 1), "--enable-scale-out")
    with run_vllm_server(
        folders[1], free_port(), tmp_path / "vllm.log", LIMIT, *options, has_v2_runner=True
    ) as url:
        client = connect_to(url, models)
        assert client.chosen_route == VLLM.chosen_routes[0]
        with pytest.raises(ValueError, match=f"Requested {K + 2} token ids per row"):
            connect_to(url, models, num_chosen=K + 1)
        assert_remote_matches_local(client, case)
        far = train(remote_config(folders, tmp_path / "far", url, **changes)).folder
    assert_close_rows(rows(far), rows(local))
