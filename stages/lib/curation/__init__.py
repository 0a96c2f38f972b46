"""Which rows stay, and in what shares: normalization, rules, filters, duplicates, mixing. No tokens here."""
