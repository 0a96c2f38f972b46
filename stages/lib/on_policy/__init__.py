"""Training on the policy's own completions: rollouts, rewards, the loop."""
