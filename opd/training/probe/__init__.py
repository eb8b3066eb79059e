"""The gradient probe of a training run, and gradients of blocks of its layers."""
