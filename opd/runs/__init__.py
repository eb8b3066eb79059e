"""Run folders: what a run records, how it resumes, and what it has shown."""
