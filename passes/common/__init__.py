"""What several passes need: processes, seeds and fingerprints, losses, scores."""
