"""Accuracy on held-out problems, with intervals and paired comparisons."""
