"""Token ids: their bytes, mask rules, and the end-of-sequence ids of two models."""
