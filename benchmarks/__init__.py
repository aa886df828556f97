"""Measurements of fedsim against peers and limits; nothing here is asserted by a test."""
