"""Responses of which tests know every number, as dumps of other libraries hold them."""
