"""Our objectives inside other trainers."""
