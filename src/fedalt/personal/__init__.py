"""What is done with the personal models of a finished run."""
