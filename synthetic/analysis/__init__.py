"""Summaries of experiment rows: intervals over seeds, and the bias-variance trade-off."""
