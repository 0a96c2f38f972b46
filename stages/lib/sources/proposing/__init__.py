"""Proposals, for people to judge: how a source must be written to read what lies at a path, found by looking and by trying."""
