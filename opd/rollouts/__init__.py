"""Rollout engines: Hugging Face generate, vLLM in this process, and vLLM servers."""
