"""The `opd` command, one sub-command a file."""
