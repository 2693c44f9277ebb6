"""Own model families, one file each; every file ends with `FAMILY = Family(...)`."""
