"""Requests: a head and a body, read into inputs, each under its key; knows no storage."""
