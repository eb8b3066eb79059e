"""Tables that figures of run folders are made of."""
