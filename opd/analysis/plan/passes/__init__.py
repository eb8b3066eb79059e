"""The passes of a step, counted on the meta device with the code that training runs."""
