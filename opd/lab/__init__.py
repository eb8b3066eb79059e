"""Toy models built from nothing: a teacher and a weaker student."""
