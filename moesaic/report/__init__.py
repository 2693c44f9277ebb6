"""Tables, figures and pages made from files and plain data; imports no torch, needs no GPU."""
