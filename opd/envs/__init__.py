"""Text games: environments, multi-turn rollouts, and their packing into batches."""
