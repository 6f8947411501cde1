"""What will be done, and what it takes. Nothing is computed."""
