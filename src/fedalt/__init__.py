"""Personalised federated fine-tuning of language models with LoRA."""
