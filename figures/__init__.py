"""Figures and tables drawn from recorded results, without torch and in seconds."""
