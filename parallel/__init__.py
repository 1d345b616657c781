"""Many processes: the mesh, data and tensor parallelism. Imports nothing of ours but the kernels."""
