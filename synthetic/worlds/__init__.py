"""Worlds: tabular MDPs, the drift chain, and worst cases of the variance bounds."""
