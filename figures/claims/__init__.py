"""The paper's claims compared with the recorded measurements, and the gallery of figures."""
