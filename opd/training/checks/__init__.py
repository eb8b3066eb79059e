"""Checks of settings, models and steps that detect silent failures of a run."""
