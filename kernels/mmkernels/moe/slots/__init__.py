"""Capacity slots for rows that travel between ranks. README.md beside this file says why."""
