"""How a model routes: record what its routers choose, keep it on disk, measure it."""
