"""The host under a process: files, logs, signals, heartbeats, devices."""
