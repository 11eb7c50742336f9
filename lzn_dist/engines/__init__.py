"""The engines, one a file: how networks, gradients and optimiser state are spread over ranks."""
