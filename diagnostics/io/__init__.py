"""Reading and writing files safely, optional packages, provenance, and how commands end."""
