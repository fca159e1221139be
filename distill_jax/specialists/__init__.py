"""Ensembles of a generalist and specialists: sections 5 and 6.1 of the paper."""
