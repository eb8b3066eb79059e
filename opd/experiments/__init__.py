"""Whole experiments in one command: the demo and the paper's comparisons."""
