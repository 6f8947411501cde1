"""What an n-bit code means, and how codes lie in files and in memory."""
