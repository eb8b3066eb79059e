"""Figures of the map of methods: gains by the regime of a pair of models (`opd map`)."""
