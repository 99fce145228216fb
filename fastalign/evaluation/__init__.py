"""Evaluation by preference: judges, win rates, labelers, estimates with their intervals."""
