"""A verl worker on a CPU."""
