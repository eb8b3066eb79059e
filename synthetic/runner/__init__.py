"""Command `opd study`: run experiments, resume them, and record their tables."""
