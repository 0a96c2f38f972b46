"""The core of Slipway: recipes, plans, the store and the worker. Imports no torch."""

__version__ = "0.1.0"
