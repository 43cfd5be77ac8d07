"""The service half of moescope: capture in vLLM's workers, the collector process, the endpoints.

Imports point one way: capture -> messages <- collector <- api.
"""
