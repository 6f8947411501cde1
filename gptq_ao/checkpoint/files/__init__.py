"""What lies on a disk. Nothing in it is trusted."""
