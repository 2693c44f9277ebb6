"""Expert construction: from a dense model to experts, routers and a mixture-of-experts checkpoint."""
