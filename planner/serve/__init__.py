"""Starts the server of an artifact, says when it answers, and ends it cleanly."""
