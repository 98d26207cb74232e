"""reconverge: train ImageNet classifiers so that the same command gives the same model, and can prove it."""

__version__ = "0.1.0"
