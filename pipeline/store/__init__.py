"""Where things live: artifacts, checkpoints, work folders, digests. Nothing here knows a stage or a recipe."""
