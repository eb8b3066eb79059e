#!/usr/bin/env bash
# Distil two teachers into one student with verl 0.9.1 and teacher top-K matching: the settings of
# arXiv 2603.25562 (v2, table A1) for one node of 8 H100s. It has never been run on such a node;
# docs/verl.md lists what was tested.
#
#   pip install "verl[vllm]==0.9.1" "math-verify[antlr4_9_3]" && pip install --no-deps opdlab
#   python examples/verl/alternate.py --batch 16 --steps 400 --out train.parquet \
#       math.parquet alfworld.parquet
#   TRAIN=train.parquet VALIDATE=aime24.parquet examples/verl/multitask.sh [OVERRIDE ...]
#
# Differences from the paper, because of limits of verl 0.9.1:
# - Tasks alternate by the order of the prompt file (alternate.py).
# - ALFWorld is not played: neither verl nor this extension supports it. Its rows are single turns
#   with recorded prompts (task, history, admissible actions). The student generates the turns, but
#   the states are not its own. `opd train --tasks` plays the games.
# - A teacher is a vLLM server on its own GPUs that scores the complete sequence: 4 GPUs train and
#   generate rollouts, 2 serve each teacher.
# - The teacher's EOS <|endoftext|> is not scored where the student ends with <|im_end|>; the mask
#   excludes that token.
# - Rollouts use another vLLM version and other random seeds.
set -euo pipefail
cd "$(dirname "$0")/../.."

MODE=${MODE:-opdlab_teacher_topk}
TOP_P=${TOP_P:-0.9}                      # the sampled-token baseline uses 1.0
STUDENT=${STUDENT:-Qwen/Qwen2.5-7B-Instruct}
MATH_TEACHER=${MATH_TEACHER:-open-thoughts/OpenThinker3-7B}
ALFWORLD_TEACHER=${ALFWORLD_TEACHER:-langfeng01/GiGPO-Qwen2.5-7B-Instruct-ALFWorld}
PROMPT=${PROMPT:-2048}
RESPONSE=${RESPONSE:-16384}              # 512 for ALFWorld, set in rollouts.yaml
modules=${VERL_USE_EXTERNAL_MODULES:-opd.integrations.verl.register}

actor=actor_rollout_ref.actor
rollout=actor_rollout_ref.rollout
teachers=distillation.teacher_models

settings=(
    # 16 prompts x 8 responses; two updates of 64 responses per step; 400 steps
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
    algorithm.adv_estimator=grpo         # needs no critic; the loss does not use its advantages

    # student
    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    $actor.ppo_mini_batch_size=8         # in prompts, so 64 responses
    $actor.ppo_micro_batch_size_per_gpu=1
    $actor.loss_agg_mode=seq-mean-token-mean  # equal weight per response, as in the published code
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
    $rollout.calculate_log_probs=True    # the sampler's log-probabilities, for the metrics
    $rollout.val_kwargs.do_sample=True
    $rollout.val_kwargs.temperature=1.0
    $rollout.val_kwargs.top_p=0.9
    $rollout.agent.agent_loop_config_path=examples/verl/rollouts.yaml
    $rollout.agent.default_agent_loop=opdlab

    # the loss: renormalised on the teacher's top 32, without clamping and without a reward
    distillation.enabled=True
    distillation.distillation_loss.loss_mode="$MODE"
    distillation.distillation_loss.topk=32
    distillation.distillation_loss.use_task_rewards=False
    distillation.distillation_loss.use_policy_gradient=False

    # teachers, selected by data_source; both serve a prompt, a response and one more token
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
        # without this, verl 0.9.1 serves a teacher with random weights (verl-project/verl#7742)
        +$teachers.$name.inference.load_format=auto
        +$teachers.$name.inference.gpu_memory_utilization=0.7
        +$teachers.$name.inference.prompt_length="$PROMPT"
        +$teachers.$name.inference.response_length="$RESPONSE"
        +$teachers.$name.inference.max_model_len=$((PROMPT + RESPONSE + 1))
        # scoring holds logits of this many tokens x the vocabulary at once: keep it small
        +$teachers.$name.inference.max_num_batched_tokens=4096
    )
done
settings+=(
    reward.custom_reward_function.path=examples/verl/reward.py
    reward.custom_reward_function.name=compute_score

    # every process on every node loads the loss modes
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES="'$modules'"
)

export VERL_USE_EXTERNAL_MODULES=$modules
exec "${PYTHON:-python}" -m verl.trainer.main_ppo "${settings[@]}" "$@"
