"""The speech study (section 3): ensembles and distilled nets as acoustic models."""
