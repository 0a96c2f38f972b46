"""The processes of one job: how they meet, what they agree on, and others' programs beside them. No model, no row."""
