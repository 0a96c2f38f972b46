"""Small tasks of encoders: classification, extraction, answering."""
