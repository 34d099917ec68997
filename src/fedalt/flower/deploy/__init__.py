"""Starting, watching and asking Flower's own programs.

address.py      host and port, free or not
reach.py        is a server there, and is it the one that the CA vouches for
processes.py    programs that end with whoever started them (bound.py)
watch.py        what they say, and how they end
lines.py        Flower's log, shortened
folders.py      state folders that one process at a time may have, and nobody else may read
superlink.py    fedalt server: flower-superlink, and the sites' keys
door.py         a way in for sites only, within limits
supervisor.py   fedalt site: flower-supernode and the trainer, kept alive
bundle.py       the app of a run: settings, or it is refused
node.py         flower-supernode, with less sleep; looks at apps, tells of heartbeats
tasks.py        flower-superexec, with less to import, and nothing that was sent
control.py      flwr: runs, nodes, keys
submission.py   fedalt submit: flwr run, and how the run ended
"""
