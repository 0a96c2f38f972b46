"""Stages that make data: cleaning, mixing, the tokenizer, packing."""
