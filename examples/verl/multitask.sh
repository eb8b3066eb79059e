#!/usr/bin/env bash
# Teacher top-K matching of two teachers into one student with verl 0.9.1: the settings of arXiv
# 2603.25562 (v2, table A1) for one node of 8 H100s. Never run on one: docs/verl.md says what was.
#
#   pip install "verl[vllm]==0.9.1" "math-verify[antlr4_9_3]" && pip install --no-deps opdlab
#   python examples/verl/alternate.py --batch 16 --steps 400 --out train.parquet \
#       math.parquet alfworld.parquet
#   TRAIN=train.parquet VALIDATE=aime24.parquet examples/verl/multitask.sh [OVERRIDE ...]
#
# What differs from the paper, because verl 0.9.1 has no such thing:
# - Tasks alternate by the order of the file (alternate.py).
# - ALFWorld is not played. verl comes without it, and nothing here plays it within verl: its rows
#   are single turns, whose prompts (task, history, admissible actions) somebody has recorded, so
#   that the student's turns are its own, but not the states it meets. `opd train --tasks` plays.
# - A teacher is a vLLM server that scores the whole sequence, on its own GPUs: 4 train and roll
#   out, 2 serve each teacher.
# - A teacher's end <|endoftext|> is not read at the student's <|im_end|>; the mask leaves it out.
# - The rollouts' vLLM is another version, and its sampler is of course not seeded alike.
set -euo pipefail
cd "$(dirname "$0")/../.."

MODE=${MODE:-opdlab_teacher_topk}
TOP_P=${TOP_P:-0.9}                      # the sampled-token baseline has 1.0
STUDENT=${STUDENT:-Qwen/Qwen2.5-7B-Instruct}
MATH_TEACHER=${MATH_TEACHER:-open-thoughts/OpenThinker3-7B}
ALFWORLD_TEACHER=${ALFWORLD_TEACHER:-langfeng01/GiGPO-Qwen2.5-7B-Instruct-ALFWorld}
PROMPT=${PROMPT:-2048}
RESPONSE=${RESPONSE:-16384}              # ALFWorld's 512 are in rollouts.yaml
modules=${VERL_USE_EXTERNAL_MODULES:-opd.integrations.verl.register}

actor=actor_rollout_ref.actor
rollout=actor_rollout_ref.rollout
teachers=distillation.teacher_models

settings=(
    # 16 prompts x 8; two updates of 64 responses each step; 400 steps
    data.train_files="${TRAIN:?a parquet file of prompts}"
    data.val_files="${VALIDATE:?a parquet file of prompts}"
    data.shuffle=False
    data.train_batch_size=16
    data.max_prompt_length="$PROMPT"
    data.max_response_length="$RESPONSE"
    trainer.total_epochs=1
    trainer.total_training_steps=400
    trainer.save_freq=80
    trainer.test_freq=80
    trainer.val_before_train=False
    trainer.nnodes=1
    trainer.n_gpus_per_node=4
    trainer.project_name=opdlab
    trainer.experiment_name="$MODE"
    algorithm.adv_estimator=grpo         # needs no critic; its advantages are not used

    # student
    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    $actor.ppo_mini_batch_size=8         # prompts: 64 responses
    $actor.ppo_micro_batch_size_per_gpu=1
    $actor.loss_agg_mode=seq-mean-token-mean  # every response alike, as the published code does
    $actor.optim.lr=2e-6
    $actor.fsdp_config.param_offload=True
    $actor.fsdp_config.optimizer_offload=True

    # rollouts
    $rollout.name=vllm
    $rollout.n=8
    $rollout.temperature=1.0
    $rollout.top_p="$TOP_P"
    $rollout.tensor_model_parallel_size=1
    $rollout.gpu_memory_utilization=0.7
    $rollout.max_num_batched_tokens=$((PROMPT + RESPONSE))
    $rollout.log_prob_micro_batch_size_per_gpu=1
    $rollout.calculate_log_probs=True    # the sampler's own, for the panel
    $rollout.val_kwargs.do_sample=True
    $rollout.val_kwargs.temperature=1.0
    $rollout.val_kwargs.top_p=0.9
    $rollout.agent.agent_loop_config_path=examples/verl/rollouts.yaml
    $rollout.agent.default_agent_loop=opdlab

    # the loss: renormalised on the teacher's top 32, nothing clamped, no reward mixed in
    distillation.enabled=True
    distillation.distillation_loss.loss_mode="$MODE"
    distillation.distillation_loss.topk=32
    distillation.distillation_loss.use_task_rewards=False
    distillation.distillation_loss.use_policy_gradient=False

    # teachers, found by data_source; both serve a prompt, a response and one token
    distillation.nnodes=1
    distillation.n_gpus_per_node=4
    distillation.teacher_key=data_source
)
for name in math alfworld; do
    path=$MATH_TEACHER
    [ "$name" = alfworld ] && path=$ALFWORLD_TEACHER
    settings+=(
        +$teachers.$name.key="$name"
        +$teachers.$name.model_path="$path"
        +$teachers.$name.num_replicas=2
        +$teachers.$name.inference.name=vllm
        +$teachers.$name.inference.tensor_model_parallel_size=1
        # without this verl 0.9.1 serves a teacher of random weights (verl-project/verl#7742)
        +$teachers.$name.inference.load_format=auto
        +$teachers.$name.inference.gpu_memory_utilization=0.7
        +$teachers.$name.inference.prompt_length="$PROMPT"
        +$teachers.$name.inference.response_length="$RESPONSE"
        +$teachers.$name.inference.max_model_len=$((PROMPT + RESPONSE + 1))
        # scoring makes logits of this many tokens x the vocabulary at once: keep it small
        +$teachers.$name.inference.max_num_batched_tokens=4096
    )
done
settings+=(
    reward.custom_reward_function.path=examples/verl/reward.py
    reward.custom_reward_function.name=compute_score

    # every process of every node loads our loss modes
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES="'$modules'"
)

export VERL_USE_EXTERNAL_MODULES=$modules
exec "${PYTHON:-python}" -m verl.trainer.main_ppo "${settings[@]}" "$@"
