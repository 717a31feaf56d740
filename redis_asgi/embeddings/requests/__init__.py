"""What is asked: a request's head and body, read into inputs, each under its key; knows no storage."""
