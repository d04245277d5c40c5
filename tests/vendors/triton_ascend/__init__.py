"""Our Triton kernels through Ascend's compilers (triton-ascend, ascendnpu-ir): to linalg, then into on-chip memory."""
