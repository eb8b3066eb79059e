"""Adapters that observe other trainers: TRL, verl, and any loop that has both models' logits."""
