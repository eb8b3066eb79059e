"""Figures of training runs, one module each."""
