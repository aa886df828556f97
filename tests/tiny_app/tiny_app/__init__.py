"""Smallest Flower app."""
