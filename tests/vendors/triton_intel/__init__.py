"""Our Triton kernels through Intel's compiler (triton-xpu): to SPIR-V for a card, and run on the CPU by OpenCL."""
