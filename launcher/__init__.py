"""Starts a run, keeps it going, says how it stands; reads manifests and never imports torch."""
