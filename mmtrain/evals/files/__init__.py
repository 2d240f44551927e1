"""Readers and scores of evaluations whose files a user has on disk."""
