"""Measures what the capture costs: the same load against several servers in shuffled rounds.

``arms`` are the servers, ``hosting`` starts them, ``rounds`` puts the load on them, ``comparison``
computes the differences, ``timing`` writes ``timing.json``, ``plot`` draws it.
"""
