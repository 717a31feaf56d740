"""Answers: the outcome of a request, told everywhere at once, and the body of an answer."""
