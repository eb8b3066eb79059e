"""The map of methods: how the gain of each depends on the pair of models (`opd map`)."""
