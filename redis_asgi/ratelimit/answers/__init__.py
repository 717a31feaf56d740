"""Answers to the client, refused or not, and to the app."""
