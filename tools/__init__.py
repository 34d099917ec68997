"""How the models that ship with fedalt, or that its recipes start from, are made. Not part of the wheel."""
