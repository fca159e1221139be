"""Knowledge distillation in JAX: pure losses, soft targets and train steps.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""
