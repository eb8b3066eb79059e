"""Checks of settings, models and steps that catch silent failures of a run."""
