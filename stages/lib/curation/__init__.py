"""Which rows stay, and in what shares: normalization, filters, duplicates, mixing. No tokens here."""
