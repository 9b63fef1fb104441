"""Serving on Kubernetes: one Deployment and what belongs to it per release, applied, watched and removed (see `driver`)."""
