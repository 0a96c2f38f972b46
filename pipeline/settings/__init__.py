"""What a person writes: YAML, strict models of it, and where and how steps run."""
