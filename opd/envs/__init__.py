"""Text games: environments, multi-turn rollouts, and packing of episodes into batches."""
