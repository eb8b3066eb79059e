"""Which losses the page of audits lists, by library: TARGET of `opd audit` without its prefix."""

from opd.objectives.catalogue import KNOWN_ERRORS, OBJECTIVES

OURS = [
    *OBJECTIVES,
    *KNOWN_ERRORS,
    *("sampled_token,gamma=0.5", "sampled_token,gamma=1", "sampled_token,ratio=token"),
    *("sampled_token,gamma=1,ratio=sequence", "sampled_token,baseline=local_kl"),
    *("sampled_token,baseline=position_mean", "sampled_token,gamma=1,baseline=leave_one_out"),
    *("sampled_token,denominator=sequence_mean", "sampled_token,denominator=group_mean"),
    *("sampled_token,denominator=sequence_sum", "sampled_token,ratio_clip=1"),
    *("sampled_token,reward_weight=1", "sampled_token,gamma=1,reward_weight=1"),
    *("sampled_token,reward_weight=1,reward_baseline=group_mean",),
    *("sampled_token,reward_weight=1,reward_baseline=group_normal",),
    *("mean_future,gamma=0.5", "mean_future,gamma=1", "full_reverse_kl,gamma=0.5"),
    *("full_reverse_kl,gamma=1", "full_reverse_kl,ratio=sequence", "full_reverse_kl,ratio_clip=1"),
    *("full_reverse_kl,reward_weight=1", "full_reverse_kl,denominator=sequence_mean"),
    *("full_sampled_future,gamma=1", "full_jsd,beta=0.1", "full_jsd,beta=0.9"),
    *("negative_log_likelihood", "reward_only,reward_weight=1"),
    "reward_only,reward_weight=1,reward_baseline=group_normal",
]
"""Compositions of ours; K = 2 unless a setting says otherwise."""

_HYBRID = "GOLD,use_uld_loss=true,uld_use_hybrid_loss=true"
_JSD = "IW-OPD,distillation_objective=jsd"
_TOPK = "distillation_mode=topk_logits,distillation_topk=2"
_KL_ONLY = "reward_weights=0"

TRL = [
    *("GKD", "GKD,beta=0", "GKD,beta=1"),
    *("GOLD", "GOLD,beta=0", "GOLD,beta=1", "GOLD,use_uld_loss=true", _HYBRID),
    f"{_HYBRID},uld_token_merge_strategy=bayesian",
    f"{_HYBRID},uld_token_merge_strategy=bayesian,uld_skip_student_eos=false,"
    "uld_skip_teacher_eos=false",
    *("Distillation", "Distillation,beta=0", "Distillation,beta=0.5"),
    *("ServerDistillation", "ServerDistillation,beta=0.5"),
    *("ServerDistillation,beta=0,loss_top_k=2",),
    "ServerDistillation,beta=0,loss_top_k=2,loss_add_tail=false",
    *("AsyncDistillation,teacher_top_k=2", "AsyncDistillation,beta=1,teacher_top_k=2"),
    *("IW-OPD", "IW-OPD,iw_opd_gamma=0", "IW-OPD,iw_opd_gamma=0,use_vllm=true", _JSD),
    *(f"{_JSD},reverse_kl_top_1_mode=argmax", f"{_JSD},loss_top_k=0", f"{_JSD},loss_top_k=2"),
    f"{_JSD},loss_top_k=2,loss_add_tail=false",
    *("SDFT,distillation_topk=2", "SDFT,distillation_mode=full_logits"),
    "SDFT,distillation_topk=2,distillation_alpha=1",
    "SDFT,distillation_topk=2,distillation_alpha=1,distillation_add_tail=true",
    "SDFT,distillation_mode=sampled_token,distillation_alpha=1",
    *("SDPO", "SDPO,num_iterations=2", f"SDPO,{_TOPK}", "SDPO,distillation_mode=full_logits"),
    *("GRPO", "GRPO,loss_type=grpo", "GRPO,scale_rewards=batch", "GRPO,scale_rewards=none"),
    *(
        f"GRPO,scale_rewards=none,loss_type={kind}"
        for kind in ("grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
    ),
    "GRPO,scale_rewards=none,loss_type=cispo,epsilon_high=5",
    "GRPO,scale_rewards=none,importance_sampling_level=sequence",
    "GRPO,scale_rewards=none,use_vllm=true",
    "GRPO,scale_rewards=none,use_vllm=true,vllm_importance_sampling_mode=token_truncate",
    *("GRPO,scale_rewards=none,num_iterations=2", "GRPO,scale_rewards=none,beta=1"),
    f"GRPO,{_KL_ONLY},beta=1",
    f"GRPO,{_KL_ONLY},beta=1,use_bias_correction_kl=false",
    "GRPO,scale_rewards=none,top_entropy_quantile=0.5",
    *("GMPO", "GMPO,scale_rewards=none", f"GMPO,{_KL_ONLY},beta=1"),
    *("RLOO", "RLOO,beta=0", f"RLOO,{_KL_ONLY},beta=1", "RLOO,beta=0,normalize_advantages=true"),
    "RLOO,beta=0,num_iterations=2",
]
"""Trainers of TRL with settings of their configurations."""

_KL = "vanilla,adv_estimator=none,use_kl_loss=true,kl_loss_coef=1,kl_loss_type"
_PG = "use_policy_gradient=true"
_MODES = ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

VERL = [
    *("kl", f"k1,{_PG}", f"k1,{_PG},clip_ratio=0.2,loss_max_clamp=10", "abs", "mse", "k2"),
    *("low_var_kl", "k3", f"k3,{_PG}", f"k2,{_PG}", f"abs,{_PG}"),
    *("forward_kl_topk", f"forward_kl_topk,{_PG}"),
    "forward_kl_topk,loss_max_clamp=10,log_prob_min_clamp=-10",
    *(f"{_KL}={kind}" for kind in ("low_var_kl", "low_var_kl+", "k1", "k1+", "k2", "k3+", "abs+")),
    *("vanilla", *(f"vanilla,loss_agg_mode={mode}" for mode in _MODES)),
    "vanilla,loss_agg_mode=seq-mean-token-sum-norm,loss_scale_factor=3",
    "vanilla,micro_batches=2",
    *("vanilla,old_log_probs=student", "vanilla,rollout_is=token", "vanilla,rollout_is=sequence"),
    *("dppo_tv", "dppo_kl", "gspo", "gspo,loss_agg_mode=seq-mean-token-mean", "sapo", "gpg"),
    *(
        "clip_cov",
        "kl_cov",
        "geo_mean",
        "geo_mean,micro_batches=2",
        "dro,dro_beta=0.1",
        "cispo",
        "bypass_mode",
    ),
    "bypass_mode,loss_type=reinforce",
    "bypass_mode,loss_type=reinforce,rollout_is=token",
    *(
        f"vanilla,adv_estimator={name}"
        for name in (
            *(
                "grpo",
                "grpo,norm_adv_by_std_in_grpo=false",
                "grpo_vectorized",
                "grpo_passk",
                "gdpo",
            ),
            *("rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus"),
            *("reinforce_plus_plus_baseline", "remax", "remax,use_kl_in_reward=true,kl_coef=1"),
            *("rloo,use_kl_in_reward=true,kl_coef=1", "optimal_token_baseline"),
            "tir_optimal_token_baseline",
        )
    ),
    "gspo,adv_estimator=rloo,loss_agg_mode=seq-mean-token-mean",
    *("geo_mean,adv_estimator=rloo", "sapo,adv_estimator=rloo"),
    *("opdlab_sampled_token", "opdlab_k2", "opdlab_k3", "opdlab_teacher_topk"),
    "opdlab_teacher_topk_bucket",
]
"""Modes of verl with settings of its configurations."""

PROPOSALS = "examples/verl/reverse_topk.py"
"""Reverse KLs on a top-K that were proposed for verl."""

TARGETS: dict[str, list[str]] = {
    "ours": OURS,
    "trl": TRL,
    "verl": VERL,
    PROPOSALS: ["student_support", "student_support_cut", "union", "union_absolute", "union_cut"],
}
"""Prefix of `opd audit` -> its losses on the page."""
