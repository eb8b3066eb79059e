"""Our objectives as loss modes of verl, and its rollouts with our mask rules."""
