"""The losses of TRL's trainers, called as they are installed, on batches of the audit.

No code of TRL is repeated here: each loss is the trainer's own method, on a trainer that was not
initialised, with a table of logits in place of its models.
"""
