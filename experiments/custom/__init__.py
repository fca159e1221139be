"""A study to copy: your own data, teacher and student."""
