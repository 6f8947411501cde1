"""What a run has finished, on disk, so that another one goes on from there."""
