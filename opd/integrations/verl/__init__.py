"""The objectives as loss modes of verl, and verl's rollouts with mask rules."""
