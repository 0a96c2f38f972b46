"""From a recipe to artifacts: the plan, the walk through it, and the worker that runs one job in one rank."""
