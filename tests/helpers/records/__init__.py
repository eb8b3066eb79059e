"""Run folders and banks of runs that tests read."""
