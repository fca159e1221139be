"""Readers of corpora: each gives a list of `recordings.Recording`, that is audio and its transcript."""
