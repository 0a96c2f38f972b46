"""Models side by side: scores, replies, reports. Nothing is trained here."""
