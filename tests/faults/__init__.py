"""Runs that are killed, hung, filled up and corrupted, and must end as if nothing had happened."""
