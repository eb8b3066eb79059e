"""Diagnostics of on-policy distillation for any trainer: metrics, alarms, probes, records."""
