"""FlashInfer's names, arguments and errors over this package's kernels."""
