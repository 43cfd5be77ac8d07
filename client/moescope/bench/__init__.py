"""A load test of any OpenAI-compatible server over HTTP.

``workload`` says what is asked, ``schedule`` when, ``driver`` asks and keeps a `Record` a request,
``stream`` reads the answers, ``latency`` makes figures of the records, ``result`` the JSON file;
``live``, ``table`` and ``plot`` show them.
"""
