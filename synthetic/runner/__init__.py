"""The command `opd study`: runs experiments, resumes them, records their tables."""
