"""The archive's process: publishes finished traces as Parquet, finds and deletes them.

It imports neither torch nor vLLM. ``python -m moescope_service.archive`` runs it.
"""
