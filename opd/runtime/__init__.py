"""Process group, seeds, and folders that are written atomically."""
