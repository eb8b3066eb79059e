"""One-line mutations of the objectives and of the exact engine, and the tests that catch them."""
