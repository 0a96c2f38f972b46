"""Stages that measure models and report."""
