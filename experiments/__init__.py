"""The paper's studies: definitions on top of distill_jax, run by launch.main."""
