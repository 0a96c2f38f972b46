"""Adapters in place of training all weights: what a recipe says of one, how it is put on a model, counted and saved."""
