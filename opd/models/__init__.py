"""Causal language models: loading, forward passes, the LM head, LoRA, sharding."""
