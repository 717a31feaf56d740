"""Rules: which of them cover a request, whom each counts, and what it charges."""
