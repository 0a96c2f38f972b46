"""Shared by stages: mathematics, data access, training. May import torch, never a stage."""
