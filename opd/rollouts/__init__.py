"""Rollout engines: Hugging Face generate, vLLM in this process, vLLM servers."""
