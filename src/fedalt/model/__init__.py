"""The frozen base, the adapted layer, adapter state, PEFT files."""
