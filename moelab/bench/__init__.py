"""What `moelab bench` times: expert products (in `pallas_kernels.grouped_matmul.bench`), MoE layers, training steps."""
