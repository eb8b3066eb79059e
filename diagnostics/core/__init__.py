"""Building blocks of metrics: mergeable accumulators, position bins, distribution statistics."""
