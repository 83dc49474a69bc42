"""edgepack: compress a model for a device, prove it, pack it, measure it there."""

__version__ = "0.1.0"
