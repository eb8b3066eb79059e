"""Students with shared parameters, and their training by exact or sampled gradients."""
