"""Replies and completions of causal models. Nothing is learned here."""
