"""How shipped models are made and tables of the docs are measured. Not part of the wheel."""
