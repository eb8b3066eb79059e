"""Sampled trajectories as batches, and Monte Carlo estimates of gradients."""
