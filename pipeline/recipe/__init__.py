"""A recipe from YAML, checked as a whole, and what lies outside it."""
