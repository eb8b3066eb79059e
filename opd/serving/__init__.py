"""Clients of servers: HTTP with retries, the vLLM protocol, addresses and keys."""
