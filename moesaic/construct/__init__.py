"""Expert construction: dense models to experts, routers and mixture-of-experts checkpoints."""
