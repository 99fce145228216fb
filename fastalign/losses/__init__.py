"""Losses on log-probabilities and scores, and the modules that take logits."""
