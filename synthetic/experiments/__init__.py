"""Experiments of the study, one per file: settings, measurement, summary and claim."""
