"""What is asked: which rules cover a request, whom each of them counts, and what it charges."""
