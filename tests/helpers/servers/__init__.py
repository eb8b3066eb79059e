"""Servers that answer as those of other projects do."""
