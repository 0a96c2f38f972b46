"""Preference pairs, reference log-probabilities, reward models."""
