"""Vendors' packages, simulated: operators by their true schemas with CPU kernels, and devices without hardware."""
