"""A load test of any OpenAI-compatible server over HTTP.

``workload`` says what is sent, ``schedule`` when; ``driver`` sends it and keeps a `MeasuredRequest`
of each; ``stream`` reads the responses, ``latency`` computes figures of the requests, ``result``
writes the JSON file; ``live``, ``table`` and ``plot`` show them. ``plan`` holds the options of
``moescope bench``, and ``command`` runs it.
"""
