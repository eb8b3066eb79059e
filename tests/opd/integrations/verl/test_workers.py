"""Objectives in verl's own workers, and verl's configuration as the example script writes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts, Support
from opd.objectives.factory import make_objective
from opd.objectives.objective import batch_losses
from opd.objectives.reduction import token_mean
from tests.helpers.paths import ROOT
from tests.helpers.processes.vllm_process import free_port
from tests.opd.integrations.verl.test_losses import MASKS, at_responses, rows, sampled_logp
from tests.opd.integrations.verl.test_topk_loss import VOCABULARY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.verl
@pytest.mark.parametrize(
    ("name", "processes"),
    [("teacher_topk", 1), ("teacher_topk", 2), ("teacher_topk_bucket", 2), ("sampled_token", 2)],
)
def test_an_update_of_verls_fsdp_actor_is_ours(
    model: Path, tmp_path: Path, name: str, processes: int
) -> None:
    from transformers import Qwen2ForCausalLM

    topk = "topk" in name
    batch_rows = rows(7, topk)
    torch.save(batch_rows, tmp_path / "rows.pt")
    environment = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    files = [str(x) for x in (model, tmp_path / "rows.pt", tmp_path / "out.pt")]
    command = [
        sys.executable,
        str(ROOT / "tests/helpers/verl/actor_worker.py"),
        *files,
        f"opdlab_{name}",
    ]
    running = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    texts = [process.communicate(timeout=1800)[0] for process in running]
    assert not any(p.returncode for p in running), "\n".join(x[-3000:] for x in texts)
    worker_output = torch.load(tmp_path / "out.pt")

    dense = Qwen2ForCausalLM.from_pretrained(model)
    width = max(map(len, MASKS))

    def placed(parts: list[Tensor]) -> Tensor:
        padded = [torch.cat([x, x.new_zeros(width - len(x), *x.shape[1:])]) for x in parts]
        return torch.stack(padded)

    logp = [dense(row["input_ids"][None]).logits[0].log_softmax(-1) for row in batch_rows]
    mask = placed([row["response_mask"] for row in batch_rows]).bool()
    teacher_logp = [at_responses([r["teacher_logprobs"] for r in batch_rows], i) for i in range(4)]
    tokens = placed([row["responses"] for row in batch_rows])
    student_logp = [at_responses(logp, i) for i in range(4)]
    support, support_logp = None, None
    if topk:
        ids = [at_responses([r["teacher_ids"] for r in batch_rows], i).long() for i in range(4)]
        support_logp = placed([x.gather(-1, k) for x, k in zip(student_logp, ids, strict=True)])
        support = Support(
            ids=placed(ids),
            student_logp=support_logp.detach(),
            teacher_logp=placed(teacher_logp),
            source="teacher",
        )
    scored = ScoredRollouts(
        tokens=tokens,
        mask=mask,
        sampler_logp=torch.zeros(mask.shape),
        prompt=torch.arange(4),
        ended=torch.ones(4, dtype=torch.bool),
        student_logp=placed([row["old_log_probs"] for row in batch_rows]) * mask,
        teacher_logp=torch.zeros(mask.shape) if topk else placed(teacher_logp)[..., 0] * mask,
        support=support,
    )
    sampled = placed([sampled_logp(batch_rows, logp, i) for i in range(4)])
    denominator = token_mean(scored)
    loss = batch_losses(
        make_objective(name), scored, sampled, support_logp, denominator=denominator
    ).sum()
    loss.backward()
    assert worker_output["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    sampler = placed([row["rollout_log_probs"] for row in batch_rows])
    mean_shift = ((sampled.detach() - sampler) * mask).sum() / mask.sum()
    observed = worker_output["metrics"]["consistency/sampler_log_ratio"]
    assert observed == pytest.approx(float(mean_shift), rel=1e-4)
    if support_logp is not None:
        mass = (support_logp.detach().exp().sum(-1) * mask).sum() / mask.sum()
        observed = worker_output["metrics"]["divergence/topk_student_mass"]
        assert observed == pytest.approx(float(mass), rel=1e-4)
    assert max(float(p.grad.abs().max()) for p in dense.parameters()) > 1e-3
    for parameter, p in dense.named_parameters():
        weight_change = p.detach() - worker_output["weights"][parameter]  # SGD with a rate of 1
        torch.testing.assert_close(weight_change, p.grad, rtol=1e-3, atol=1e-6)


STANDS_IN = """
    trainer.logger=[console]
    trainer.n_gpus_per_node=1
    trainer.save_freq=-1
    trainer.test_freq=-1
    trainer.total_training_steps=4
    +ray_kwargs.ray_init.address=local
    +ray_kwargs.ray_init.include_dashboard=False
    +ray_kwargs.ray_init.num_gpus=3
    ray_kwargs.ray_init.num_cpus=32
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM=cpu
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    data.dataloader_num_workers=0
    data.train_batch_size=2
    distillation.n_gpus_per_node=2
    distillation.teacher_models.math.num_replicas=1
    distillation.teacher_models.alfworld.num_replicas=1
    distillation.distillation_loss.topk=4
    reward.num_workers=1
    actor_rollout_ref.rollout.n=2
    actor_rollout_ref.rollout.agent.num_workers=1
    actor_rollout_ref.model.use_remove_padding=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr=1e-3
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.param_offload=False
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=False
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype=fp32
"""
"""Overrides that replace eight GPUs: small sizes, and three unused GPUs declared to Ray."""


@pytest.mark.verl
@pytest.mark.parametrize(
    ("name", "updates"),
    [("teacher_topk", 1), pytest.param("sampled_token", 2, marks=pytest.mark.slow)],
)
def test_verls_trainer_runs_the_script_with_two_teachers(
    tiny_pair: tuple[Path, Path], tmp_path: Path, name: str, updates: int
) -> None:
    """Run verl from its command line: Ray, queue, rollouts, teachers, FSDP, weight transfer.

    The second task's teacher is the initial student. Its first steps have no cost unless a teacher,
    a token or a weight is in the wrong place; those of the first task do.

    With two updates per step, as in the script, the second update sees weights that the first has
    changed; with one update the loss sees the student that sampled, up to rounding.
    """
    student, teacher = tiny_pair
    for task in ("math", "alfworld"):
        prompts = [[{"role": "user", "content": f"{i}+{i + 1}="}] for i in range(4)]
        reward = [{"style": "rule", "ground_truth": "1"}] * 4
        table = pd.DataFrame({"prompt": prompts, "reward_model": reward})
        table["data_source"], table["extra_info"] = task, [{"index": i} for i in range(4)]
        table.to_parquet(tmp_path / f"{task}.parquet")
    files = [str(tmp_path / f"{task}.parquet") for task in ("math", "alfworld")]
    alternate = [sys.executable, str(ROOT / "examples/verl/alternate.py"), *files]
    train = str(tmp_path / "train.parquet")
    subprocess.run([*alternate, "--batch", "2", "--steps", "4", "--out", train], check=True)
    rollouts = (ROOT / "examples/verl/rollouts.yaml").read_text()
    rollouts = rollouts.replace("[paper]", '["role:eos"]').replace("512", "12")
    (tmp_path / "rollouts.yaml").write_text(rollouts)
    (tmp_path / "reward.py").write_text("def compute_score(*_, **__):\n    return 0.0\n")
    words = [
        *STANDS_IN.split(),
        f"actor_rollout_ref.actor.ppo_mini_batch_size={2 // updates}",
        f"reward.custom_reward_function.path={tmp_path}/reward.py",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={tmp_path}/rollouts.yaml",
        f"trainer.default_local_dir={tmp_path}/checkpoints",
        f"hydra.run.dir={tmp_path}/hydra",
    ]
    environment = {
        "TRAIN": train,
        "VALIDATE": files[0],
        "MODE": f"opdlab_{name}",
        "TOP_P": "1.0",
        "STUDENT": str(student),
        "MATH_TEACHER": str(teacher),
        "ALFWORLD_TEACHER": str(student),
        "PROMPT": "64",
        "RESPONSE": "24",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "tests.helpers.verl.cpu_platform,"
        "opd.integrations.verl.register",
        "VERL_CPU_WEIGHTS": str(tmp_path / "weights.pt"),
    }
    process = subprocess.run(
        [ROOT / "examples/verl/multitask.sh", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]
    lines = [line for line in process.stdout.splitlines() if " step:" in line]
    steps = [
        {key: float(x) for key, x in re.findall(r"(\S+):(?:np\.\w+\()?(-?[\d.e+-]+)", line)}
        for line in lines
    ]
    assert [row["training/global_step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["response_length/max"] <= 24 for row in steps[::2])
    assert all(row["response_length/max"] <= 12 for row in steps[1::2])
    # the rollout servers have the actor's weights: before its updates, a step's student sampled
    assert max(row["training/rollout_probs_diff_max"] for row in steps) < 1e-5
    if updates == 1:
        assert all(abs(row["actor/consistency/sampler_log_ratio"]) < 1e-5 for row in steps)
        assert all(row["actor/consistency/sampler_log_ratio_square"] < 1e-9 for row in steps)
    assert steps[0]["actor/grad_norm"] > 0
    assert len({row["actor/grad_norm"] for row in steps}) == 4
    if name == "sampled_token":
        divergences = [abs(row["actor/divergence/k1"]) for row in steps]
    else:
        divergences = [row["actor/distillation/loss"] for row in steps]
    assert divergences[0] > 10 * divergences[1] >= 0


# --- the script ----------------------------------------------------------------------------------


def script(tmp_path: Path, **environment: str) -> list[str]:
    """Return the arguments with which examples/verl/multitask.sh starts verl."""
    record = tmp_path / "record.sh"
    record.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    record.chmod(0o755)
    variables = {"TRAIN": "train.parquet", "VALIDATE": "test.parquet", "PYTHON": str(record)}
    process = subprocess.run(
        [ROOT / "examples/verl/multitask.sh", "trainer.save_freq=7"],
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    words = process.stdout.split("\0")[:-1]
    assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    return words[2:]


def test_the_script_states_the_papers_settings(tmp_path: Path) -> None:
    words = script(tmp_path)
    stated = dict(word.lstrip("+").split("=", 1) for word in words)
    prompts, mini = (
        int(stated[name])
        for name in ("data.train_batch_size", "actor_rollout_ref.actor.ppo_mini_batch_size")
    )
    group = int(stated["actor_rollout_ref.rollout.n"])
    assert (prompts * group, mini * group) == (128, 64)
    expected = {
        "actor_rollout_ref.actor.optim.lr": "2e-6",
        "actor_rollout_ref.rollout.top_p": "0.9",
        "distillation.distillation_loss.topk": "32",
        "data.max_response_length": "16384",
        "trainer.total_training_steps": "400",
        "trainer.save_freq": "7",  # additional arguments come last
    }
    assert {name: stated[name] for name in expected} == expected
    gpus = int(stated["trainer.n_gpus_per_node"]) + int(stated["distillation.n_gpus_per_node"])
    assert gpus == 8


@pytest.mark.verl
def test_verl_composes_the_scripts_settings_and_both_teachers(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    import opd.integrations.verl.register  # noqa: F401

    words = script(tmp_path)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=words)  # raises on an unknown name
    for section in ("distillation", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"):
        part = config
        for name in section.split("."):
            part = part[name]
        omega_conf_to_dataclass(part)  # raises on an added name that does not exist
    teachers = omega_conf_to_dataclass(config.distillation).teacher_models
    assert set(teachers) == {"math", "alfworld"}
    for teacher in teachers.values():
        assert teacher.inference.load_format == "auto", "not random weights"
        assert teacher.inference.max_model_len == 2048 + 16384 + 1
    assert config.distillation.distillation_loss.loss_mode == "opdlab_teacher_topk"
    assert config.algorithm.adv_estimator == "grpo"


def test_tasks_alternate_by_the_order_of_a_file(tmp_path: Path) -> None:
    for name, count in (("math", 5), ("alfworld", 2)):
        table = pd.DataFrame({"prompt": [f"{name}{i}" for i in range(count)]})
        table.assign(data_source=name).to_parquet(tmp_path / f"{name}.parquet")
    sources = [str(tmp_path / f"{name}.parquet") for name in ("math", "alfworld")]
    command = [sys.executable, str(ROOT / "examples/verl/alternate.py"), *sources]
    command += ["--batch", "2", "--steps", "5", "--out", str(tmp_path / "train.parquet")]
    subprocess.run(command, check=True)
    prompts = list(pd.read_parquet(tmp_path / "train.parquet")["prompt"])
    assert prompts == [
        "math0", "math1", "alfworld0", "alfworld1", "math2", "math3",
        "alfworld0", "alfworld1", "math4", "math0",
    ]  # fmt: skip
    command[3] = command[2]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "each file must hold one data_source of its own" in process.stderr


# --- rollouts ------------------------------------------------------------------------------------


class Server:
    """Inference server that always returns these ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.asked = ids, {}

    async def generate(self, sampling_params: dict, **_: object) -> object:
        from verl.workers.rollout.replica import TokenOutput

        self.asked = sampling_params
        response_ids = self.ids[: sampling_params.get("max_tokens")]
        return TokenOutput(token_ids=response_ids, log_probs=[-0.5] * len(response_ids))


@pytest.mark.verl
def test_rollouts_are_masked_and_as_long_as_their_task_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build verl's agent loop as its workers do, from the file next to the example script."""
    import asyncio

    import hydra
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop import agent_loop
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from opd.lab.build import make_tokenizer

    tokenizer = make_tokenizer()
    (settings,) = OmegaConf.load(ROOT / "examples/verl/rollouts.yaml")
    assert settings.rules == ["paper"]  # this tokenizer lacks the token `think` of that rule
    settings.rules = ["token:<:first", "role:eos"]
    trainer = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"prompt_length": 64, "response_length": 600}}}
    )

    def loop(server: Server, **changes: object) -> object:
        return hydra.utils.instantiate(
            config={**settings, **changes},
            trainer_config=agent_loop.DictConfigWrap(trainer),
            server_manager=server,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=agent_loop.DictConfigWrap(OmegaConf.create({})),
        )

    end = tokenizer.eos_token_id
    less_than_id = tokenizer.encode("<", add_special_tokens=False)[0]
    digit_id = tokenizer.encode("1", add_special_tokens=False)[0]
    ids = [digit_id, less_than_id, digit_id, less_than_id, end]
    prompt = [{"role": "user", "content": "1+1"}]

    async def run(server: Server, task: str, **changes: object) -> object:
        masked_loop = loop(server, **changes)
        return await masked_loop.run({"temperature": 1.0}, raw_prompt=prompt, data_source=task)

    output = asyncio.run(run(Server(ids), "math"))
    assert output.response_ids == ids
    assert output.response_mask == [1, 0, 1, 1, 0]  # the first `<` and the first end
    server = Server([digit_id] * 590)
    assert len(asyncio.run(run(server, "math")).response_ids) == 590
    assert len(asyncio.run(run(server, "alfworld")).response_ids) == 512
    plain = asyncio.run(run(Server(ids), "math", rules=[]))
    assert plain.response_mask == [1] * 5
    with pytest.raises(Exception, match=r"response_length, which is 600"):
        loop(server, lengths={"alfworld": 601})
