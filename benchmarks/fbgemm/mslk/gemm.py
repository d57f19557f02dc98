"""Its kernels are registered with the package."""
