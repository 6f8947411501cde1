"""What formats of other libraries say of a weight, whichever it is."""
