"""The losses of verl, called as they are installed, on batches of the audit.

No code of verl is repeated here: each loss is `ppo_loss` or `distillation_ppo_loss` of its workers,
its advantages are those of its trainer, and batches have the layout that its trainer sends.
"""
