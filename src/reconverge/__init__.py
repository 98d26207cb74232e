"""reconverge: train image classifiers so that the same command gives the same model, bit for bit."""

__version__ = "0.1.0"
