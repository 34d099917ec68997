"""Fast paths: each is held to the plain one by a test, and tried out on the model before it is used."""
