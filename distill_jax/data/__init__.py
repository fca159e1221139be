"""Data: sources, transfer sets, and epochs that run on the device."""
