"""The claims, one module a section of the list."""
