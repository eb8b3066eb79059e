"""Exact moments of gradient estimators by dynamic programming, without sampling."""
