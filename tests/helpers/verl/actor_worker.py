"""One process of verl's own FSDP actor, on the CPU: it takes one update and writes what it became.

Started by test_verl_workers as

    python tests/helpers/verl/actor_worker.py MODEL BATCH OUT LOSS_MODE [OVERRIDE ...]

with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank r of n gets the r-th n-th of the rows.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch


def configured(model: str, mode: str, overrides: list[str]) -> Any:
    """verl's own configuration, as its command line composes it."""
    from hydra import compose, initialize_config_module

    fp32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    actor = "actor_rollout_ref.actor"
    settings = [
        f"actor_rollout_ref.model.path={model}",
        "+actor_rollout_ref.model.load_tokenizer=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.use_remove_padding=False",
        f"{actor}.strategy=fsdp2",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"+{actor}.fsdp_config.mixed_precision={fp32}",
        f"{actor}.ppo_micro_batch_size_per_gpu=1",
        f"{actor}.ppo_mini_batch_size=2",
        f"{actor}.optim.optimizer=SGD",
        f"{actor}.optim.lr=1.0",
        f"{actor}.optim.weight_decay=0.0",
        f"{actor}.optim.clip_grad=1e9",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.n=2",
        "distillation.enabled=True",
        "distillation.nnodes=1",
        "distillation.n_gpus_per_node=1",
        f"distillation.distillation_loss.loss_mode={mode}",
        "distillation.distillation_loss.topk=4",
        "distillation.distillation_loss.use_task_rewards=False",
        "distillation.teacher_models.teacher_model.model_path=unused",
        "distillation.teacher_models.teacher_model.inference.name=vllm",
        "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=1",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=settings + overrides)


def batch(rows: list[dict[str, Any]], topk: bool) -> Any:
    """A batch as verl's trainer sends it to its workers."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    tensors = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        for name in rows[0]
    }
    data = TensorDict(tensors, batch_size=[len(rows)])
    tu.assign_non_tensor(
        data,
        global_batch_size=4,
        mini_batch_size=4,
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        temperature=1.0,
        calculate_entropy=False,
        distillation_use_topk=topk,
        distillation_only=topk,
    )
    return data


def main() -> None:
    model, source, out, mode, *overrides = sys.argv[1:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "LOCAL_RANK": str(rank)}
    from verl.workers.engine_workers import ActorRolloutRefWorker

    import opd.integrations.verl.register  # noqa: F401
    import tests.helpers.verl.cpu_platform  # noqa: F401

    config = configured(model, mode, overrides)
    worker = ActorRolloutRefWorker(
        config=config.actor_rollout_ref, role="actor", distillation_config=config.distillation
    )
    worker.init_model()
    rows = torch.load(source)
    local_rows = rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]
    output = worker.update_actor(batch(local_rows, topk="topk" in mode))
    state = worker.actor.engine.module.state_dict()
    weights = {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()
    }
    if rank == 0:
        from verl.utils.metric import reduce_metrics

        metrics = {name: float(x) for name, x in reduce_metrics(output["metrics"]).items()}
        torch.save({"weights": weights, "metrics": metrics}, Path(out))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
