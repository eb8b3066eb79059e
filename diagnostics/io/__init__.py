"""File input and output, optional packages, code provenance, and command exit codes."""
