"""Models on disk and in memory: loading, publishing, heads, adapters, sizes. Nothing is trained here."""
