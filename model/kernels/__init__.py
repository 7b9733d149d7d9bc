"""GPU kernels, each with a plain function of the same name in `model.layers` that it is compared with."""
