"""What several passes share: processes, seeds and fingerprints, losses, scores."""
