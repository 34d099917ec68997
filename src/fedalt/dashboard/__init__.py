"""The dashboard: runs of a folder in a browser on this machine, live, to be started, stopped and talked to."""
