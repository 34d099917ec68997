"""A round: clients, server, participation, diagnostics."""
