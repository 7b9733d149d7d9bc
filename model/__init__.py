"""What is computed: the Qwen3-Next modules, assembled into megatron-core's HybridModel."""
