"""sa-engine: a folder of photos in, an SA-1B-style segmentation data set out."""

__version__ = "0.1.0"
