"""What every room stands on: errors, config, registry, files, lineage, console. Imports no torch."""
