"""Linen building blocks that know no method."""
