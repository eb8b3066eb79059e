"""Scores of a teacher on disk, so that it need not be in memory."""
