"""The collector process: reassembles routes, keeps them, counts experts, writes the log.

It imports neither torch nor vLLM. ``python -m moescope_service.collector`` runs it.
"""
