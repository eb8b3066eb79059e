"""Token ids: their bytes, mask rules, and the EOS ids of two models."""
