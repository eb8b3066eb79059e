"""Figures of training runs, one a file."""
