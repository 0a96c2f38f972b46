"""What stages share, in rooms; each may use those on floors below it (tests/contracts/test_layers.py holds the table)."""
