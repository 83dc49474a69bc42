"""Releases for many devices: signed, rolled out in waves, proved on each device, taken back where they fail."""
