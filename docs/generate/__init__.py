"""Generators of the documentation pages, and the hook that adds files of the repository to them."""
