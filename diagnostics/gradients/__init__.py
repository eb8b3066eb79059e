"""Gradient probes: signal, noise and bias of gradient estimators, measured on one batch."""
