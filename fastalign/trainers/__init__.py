"""The training commands, one algorithm a file."""
