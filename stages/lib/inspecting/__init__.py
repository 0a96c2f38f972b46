"""What `slipway inspect` tells: of data from outside, of rows that a stage wrote, of models."""
