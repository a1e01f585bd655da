"""What the Triton kernels of several methods share: devices and tiles, templates, figures."""
