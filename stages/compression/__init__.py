"""Stages that make a model smaller."""
