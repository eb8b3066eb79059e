"""Figures and tables, drawn from recorded results in seconds and without torch."""
