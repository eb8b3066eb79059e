"""A pretrained pair whose teacher was taught word problems."""
