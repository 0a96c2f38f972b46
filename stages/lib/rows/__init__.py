"""Rows as all stages keep them, and the ledger of those that were dropped. Nothing from outside is read here."""
