"""The processes of one job: how they meet, and what they agree on. No model, no row."""
