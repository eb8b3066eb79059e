"""The audit: what a distillation loss estimates, how noisily, and which known faults it has."""
