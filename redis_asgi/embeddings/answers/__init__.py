"""What is said: the outcome of a request, and the body of an answer."""
