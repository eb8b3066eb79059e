"""The paper's claims beside our measurements, and the gallery of all figures."""
