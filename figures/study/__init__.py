"""Figures of the synthetic study, one a file."""
