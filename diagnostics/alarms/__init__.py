"""Alarms: rules over the rows of a run that say what went wrong, and when."""
