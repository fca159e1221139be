"""Specialists of section 5 on Han characters, classes of which many are easily confused."""
