"""How tiny-base is made: its text, its tokenizer, its pretraining."""
