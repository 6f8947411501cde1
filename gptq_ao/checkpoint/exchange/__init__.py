"""What all formats have in common: what one is, and what it says of a model and of a weight."""
