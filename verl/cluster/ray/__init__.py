"""Ranks in processes of their own, on this machine and others, under Ray."""
