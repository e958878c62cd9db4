"""Serving: talk to a trained model."""
