"""On-policy distillation of language models: trainer, objectives, checks and reports."""
