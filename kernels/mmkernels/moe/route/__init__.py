"""Routing: which experts take which token, and the row of each assignment. README.md here has the mathematics."""
