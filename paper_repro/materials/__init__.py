"""What is measured on: models and texts that arrive as packages, and the model that is trained here."""
