"""The one entropy coder: bytes of weights to fewer bytes, and back exactly. The format is docs/coding.md."""
