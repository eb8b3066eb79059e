"""Synthetic MDPs on which bias and variance of distillation gradients are known exactly."""
