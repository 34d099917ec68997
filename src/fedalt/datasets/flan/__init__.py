"""The eight tasks of the FedALT paper, made into rows from Hugging Face data sets."""
