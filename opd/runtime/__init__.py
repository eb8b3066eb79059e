"""Seeds, processes, and folders that appear whole or not at all."""
