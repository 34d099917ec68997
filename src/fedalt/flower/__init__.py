"""The same run across machines, on Flower. The only room that imports ``flwr``.

server_app.py   the rounds of ``runs/rounds.py``, with sites as its clients  (process of the SuperLink)
nodes.py        which node is which client; asks until answered or late
client_app.py   hands a message on to the site's trainer                         (process of the SuperNode)
trainer.py      holds the base model between rounds                              (process of the site)
site.py         trains, scores and keeps one client with ``client_round``
requests.py     all that server and site say to each other, with types and bounds
own.py          what is a site's own to say
wire.py         tensors as bytes
inflate.py      Flower's objects, within bounds
"""
