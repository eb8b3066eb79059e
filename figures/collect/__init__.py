"""Tables collected from run folders."""
