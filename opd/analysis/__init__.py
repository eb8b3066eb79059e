"""Analyses before and after a run: the doctor, offline metrics, probes of the teacher."""
