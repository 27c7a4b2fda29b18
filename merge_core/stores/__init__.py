"""Where files lie: local disks, object stores, the hub."""
