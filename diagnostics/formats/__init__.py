"""Dumps of other tools: one declared format each, a recogniser, and conversion to our columns."""
