"""Section 3 of the paper: preliminary experiments on MNIST."""
