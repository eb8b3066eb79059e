"""Figures of the synthetic study, one module each."""
