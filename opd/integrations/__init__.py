"""Use of the objectives in other trainers."""
