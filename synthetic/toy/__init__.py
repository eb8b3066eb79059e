"""The published continuous toy problem and the distillation of its teachers."""
