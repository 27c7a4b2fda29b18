"""What a person starts: the command line, the driver and its schedule."""
