"""One experiment a file: settings, measurement, summary and claim."""
