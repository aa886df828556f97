"""Clients that do nothing."""
