"""Ranks that die or hang: heartbeats, and the watchdog that ends the others."""
