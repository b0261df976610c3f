"""Convolutions of maps of few pixels, 3 × 3 filters, forward and the gradient of the maps.

- `reference`: by torch's own operations, the specification;
- `gpu`: the launchers of the Triton kernels; `gpu_kernels`: the kernels;
- `op`: the functions, and which maps they are for.
"""

from ncollapse.kernels.convolution.op import fits, small_convolution, small_convolution_input_grad

__all__ = ["fits", "small_convolution", "small_convolution_input_grad"]
