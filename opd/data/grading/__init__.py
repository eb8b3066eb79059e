"""Graders: whether a response gives the right answer."""
