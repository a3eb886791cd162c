"""How it is measured, where several tables and figures share it."""
