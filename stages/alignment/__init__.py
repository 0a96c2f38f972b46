"""Stages that train on preferences: which of two answers is the better one."""
