"""Mathematics on tensors: losses, estimators, metrics. No model is loaded and no file is opened here."""
