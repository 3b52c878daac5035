"""Headers of safetensors and GGUF files, and the block types of ggml; no weights, nothing trusted."""
