"""Recipes on a cluster: which steps become jobs, in what order, and what has become of them."""
