"""One file a command, found by its name. See `moesaic.cli.main` for what a file must hold."""
