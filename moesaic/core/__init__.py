"""What every room stands on; imports no torch."""
