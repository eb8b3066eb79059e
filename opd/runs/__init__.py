"""Run folders: what a run records, how it resumes, and its result."""
