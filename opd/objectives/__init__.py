"""Objectives: credit, surrogate and reduction, shared by the study and the trainer."""
