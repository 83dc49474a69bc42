"""The devices that a person has: what they are, whether they are fit, and devices.toml."""
